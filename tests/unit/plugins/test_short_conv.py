"""The short causal convolution against its definition, in one call and cut anyhow."""

from __future__ import annotations

import pytest
import torch

from moshi_ttt.plugins.common.short_conv import convolve, convolve_step, empty_cache, one_at_lag


def naive(z, taps):
    """``out_t = sum_j taps[:, j] z_(t-j)``, token by token, nothing before the first."""
    out = torch.zeros_like(z)
    for t in range(z.shape[1]):
        for j in range(taps.shape[1]):
            if t - j >= 0:
                out[:, t] += taps[:, j] * z[:, t - j]
    return out


def drawn(length=11, batch=3, channels=5, kernel=4, dtype=torch.float64):
    generator = torch.Generator().manual_seed(kernel + length)
    z = torch.randn(batch, length, channels, generator=generator, dtype=torch.float64).to(dtype)
    taps = torch.randn(channels, kernel, generator=generator, dtype=torch.float64).to(dtype)
    return z, taps, empty_cache(batch, channels, kernel, None, dtype)


@pytest.mark.parametrize("kernel", [1, 2, 4, 7])
@pytest.mark.parametrize("length", [1, 2, 3, 11])
def test_it_is_the_definition(kernel, length):
    z, taps, cache = drawn(length, kernel=kernel)
    out, after = convolve(z, taps, cache)
    assert torch.allclose(out, naive(z, taps), atol=1e-13)
    expected = torch.cat([cache, z], 1)[:, length:]
    assert torch.equal(after, expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kernel", [1, 2, 4])
def test_every_cut_gives_the_same_bits(kernel, dtype):
    z, taps, start = drawn(13, kernel=kernel, dtype=dtype)
    whole, final = convolve(z, taps, start)
    for size in (1, 2, 3, 5, 12):
        cache, parts = start, []
        for piece in z.split(size, 1):
            part, cache = convolve(piece, taps, cache)
            parts.append(part)
        assert torch.equal(torch.cat(parts, 1), whole)
        assert torch.equal(cache, final)
    buffer = start.clone()
    address = buffer.data_ptr()
    steps = [convolve_step(token, taps, buffer) for token in z.split(1, 1)]
    assert torch.equal(torch.cat(steps, 1), whole)
    assert torch.equal(buffer, final)
    assert buffer.data_ptr() == address


def test_a_row_that_does_not_run_keeps_its_cache():
    z, taps, cache = drawn(6)
    buffer, held = cache.clone(), torch.tensor([True, False, True])
    for t, token in enumerate(z.split(1, 1)):
        convolve_step(token, taps, buffer, held if t % 2 else None)
    _, everything = convolve(z, taps, cache)
    _, without = convolve(z[:, ::2], taps, cache)
    assert torch.equal(buffer[0], everything[0])
    assert torch.equal(buffer[1], without[1])


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 1e38])
@pytest.mark.parametrize("whole_token", [True, False])
def test_a_token_that_is_not_finite_counts_as_zero(value, whole_token):
    z, taps, cache = drawn(9, dtype=torch.float32)
    silent, bad = z.clone(), z.clone()
    silent[1, 4] = 0
    bad[1, 4] = value if whole_token else torch.where(torch.arange(5) == 2, value, bad[1, 4])
    expected, final = convolve(silent, taps, cache)
    out, after = convolve(bad, taps, cache)
    assert torch.equal(out, expected)
    assert torch.equal(after, final)
    buffer = cache.clone()
    steps = [convolve_step(token, taps, buffer) for token in bad.split(1, 1)]
    assert torch.equal(torch.cat(steps, 1), expected)
    assert torch.equal(buffer, final)


def test_what_is_not_kept_counts_as_zero():
    z, taps, cache = drawn(9)
    kept = torch.ones(3, 9, dtype=torch.bool)
    kept[2, 5] = False
    expected, final = convolve(torch.where(kept[..., None], z, 0), taps, cache)
    out, after = convolve(z, taps, cache, kept)
    assert torch.equal(out, expected)
    assert torch.equal(after, final)
    buffer = cache.clone()
    steps = [convolve_step(z[:, t : t + 1], taps, buffer, kept=kept[:, t : t + 1]) for t in range(9)]
    assert torch.equal(torch.cat(steps, 1), expected)


def test_gradients():
    z, taps, cache = (tensor.requires_grad_() for tensor in drawn(4, batch=2, channels=2))
    assert torch.autograd.gradcheck(convolve, (z, taps, cache))
    assert torch.autograd.gradgradcheck(convolve, (z, taps, cache))


def test_the_cache_has_a_dtype_of_its_own():
    z, taps, _ = drawn(5, dtype=torch.bfloat16)
    cache = empty_cache(3, 5, 4, None, torch.float32)
    out, after = convolve(z, taps, cache)
    assert (out.dtype, after.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(after, z[:, -3:].float())


def test_one_at_lag_is_the_token_before():
    z, _, cache = drawn(6)
    out, _ = convolve(z, one_at_lag(5, 4, 1), cache)
    assert torch.equal(out[:, 1:], z[:, :-1])
    assert torch.equal(out[:, 0], torch.zeros_like(z[:, 0]))
    with pytest.raises(ValueError, match=r"1 taps reach lags 0 to 0, not 1\. Give 2 taps or more"):
        one_at_lag(5, 1, 1)
