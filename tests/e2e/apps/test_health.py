"""What a measurement of health costs, when it is made, and that a cheap one says what the naive definition says."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from moshi_ttt.core.block import BlockContext
from moshi_ttt.core.health import HealthMonitor, sample_length
from moshi_ttt.core.injection import Injection
from tests.e2e.apps.injected import injected

CHUNKS = {"ttt_linear": 32, "ttt_mlp": 32, "ttt_multilayer": 32, "ttt_ridge": 32, "gating_mlp": 128}
MOST_LAUNCHES = {"ttt_linear": 520, "ttt_mlp": 650, "ttt_multilayer": 790, "ttt_ridge": 560, "gating_mlp": 150}
"""Operations of one measurement of a block, reading included. Of 1,250 tokens, measured whole: 3,160 to 6,590 (147)."""


class Operations(TorchDispatchMode):
    """Counts what is dispatched, and keeps the largest tensor of 8-byte numbers that was made."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self.largest_float64 = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.dtype == torch.float64:
            self.largest_float64 = max(self.largest_float64, out.numel())
        return out


def draw(injection: Injection, length: int, rows: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(rows, length, injection.model.dim, generator=generator)


def launches(injection: Injection, length: int, monitor: HealthMonitor | None) -> int:
    """Of a forward pass under activation checkpointing and its backward, and of reading the monitor."""
    (block,) = injection.blocks.values()
    x = draw(injection, length).requires_grad_()

    def call(x):
        return block(x, None, BlockContext(input_embeddings=x))[0]

    with Operations() as made:
        if monitor is None:
            checkpoint(call, x, use_reentrant=False).sum().backward()
        else:
            with monitor:
                checkpoint(call, x, use_reentrant=False).sum().backward()
            monitor.read()
    return made.count


@pytest.mark.first_by_default
@pytest.mark.parametrize("variant", CHUNKS)
def test_a_sample_costs_the_same_for_every_length_and_is_taken_once_under_checkpointing(variant):
    injection = injected(variant, chunk=CHUNKS[variant])
    extra = []
    for length in (2 * CHUNKS[variant] + 1, 640):
        launches(injection, length, None)  # what is made once
        plain = launches(injection, length, None)
        extra.append(launches(injection, length, HealthMonitor(injection.blocks, sample=True)) - plain)
    assert extra[0] == pytest.approx(extra[1], abs=4)  # a sample that is all of the sequence needs no slice
    assert 0 < max(extra) <= MOST_LAUNCHES[variant]


def test_each_block_is_measured_once_until_it_is_read(monkeypatch):
    injection = injected("ttt_mlp", chunk=CHUNKS["ttt_mlp"])
    ((site, block),) = injection.blocks.items()
    calls = []
    real = block.statistics
    monkeypatch.setattr(block, "statistics", lambda x, context: calls.append(x.shape) or real(x, context))
    x = draw(injection, 80)
    with HealthMonitor(injection.blocks) as monitor:
        block(x)
        block(2 * x)
        first = monitor.read()[site].figures
        assert calls == [x.shape]
        block(2 * x)
        assert monitor.read()[site].figures != first
    assert len(calls) == 2
    with monitor:
        block(x)
    assert len(calls) == 3
    assert monitor.read()[site].figures == first


@pytest.mark.parametrize("variant", CHUNKS)
def test_a_sample_is_the_first_tokens_and_the_rest_is_measured_whole(variant):
    injection = injected(variant, chunk=CHUNKS[variant])
    ((site, block),) = injection.blocks.items()
    x, length = draw(injection, 640, rows=2), sample_length(block)
    assert length == 2 * CHUNKS[variant] + 1 < 640
    with HealthMonitor(injection.blocks, sample=True) as monitor:
        _, state = block(x, None, BlockContext(input_embeddings=2 * x))
    figures = monitor.read()[site].figures
    with torch.no_grad():
        first = block.statistics(x[:, :length], BlockContext(input_embeddings=2 * x[:, :length]))
    for name, value in first.items():
        assert figures[name] == pytest.approx(float(value), rel=1e-5, abs=1e-7), name
    assert figures["drift"] == float(block.drift(state).max())
    spoiled = x.clone()
    spoiled[1, 639] = torch.nan
    with HealthMonitor(injection.blocks, sample=True) as monitor:
        block(spoiled, None, BlockContext(input_embeddings=spoiled))
    found = monitor.read()[site]
    assert any("output is not finite" in flag for flag in found.red_flags)
    assert figures["skipped_updates"] == 0
    assert found.figures["skipped_updates"] == 1
    assert any("1 updates were skipped" in flag for flag in found.red_flags)


@pytest.mark.parametrize(("dtype", "precision"), [("float32", "fp32_state"), ("bfloat16", "uniform")])
@pytest.mark.parametrize("variant", [variant for variant in CHUNKS if variant != "ttt_ridge"])
def test_drift_and_norms_are_those_of_float64_without_a_copy_in_it(variant, dtype, precision):
    injection = injected(variant, dtype, precision, chunk=CHUNKS[variant])
    ((site, block),) = injection.blocks.items()
    x = draw(injection, 320, rows=3).to(getattr(torch, dtype))
    with torch.no_grad(), HealthMonitor(injection.blocks) as monitor:
        _, state = block(x, None, BlockContext(input_embeddings=x))
    numbers = [tensor.double() for tensor in state.values() if tensor.is_floating_point()]
    norm = sum(float(tensor.square().sum()) for tensor in numbers) ** 0.5
    assert monitor.read()[site].figures["state_norm"] == pytest.approx(norm, rel=1e-12)
    if variant == "gating_mlp":
        weight = block.info.mlp.linear_out.weight.double()
        moved = block.accumulated_update(state).double().flatten(1).norm(dim=1)
        expected = moved / weight.norm()
    else:
        start = {name: tensor for name, tensor in block.init_state(1).items() if tensor.requires_grad}
        size = sum(tensor.detach().double().square().sum() for tensor in start.values())
        moved = sum((state[n].double() - t.detach().double()).square().flatten(1).sum(1) for n, t in start.items())
        expected = (moved / size).sqrt()
    with Operations() as made:
        drift = block.drift(state)
    assert drift.dtype == torch.float64
    assert torch.allclose(drift, expected, rtol=1e-6)
    assert made.largest_float64 <= 3


@pytest.mark.parametrize("values", [(0.0, 1.0), (1.0, torch.nan), (torch.inf, -torch.inf, 3.0, -0.0), (3e38, 1e-45)])
def test_the_share_that_is_not_finite(values):
    injection = injected("ttt_linear", chunk=CHUNKS["ttt_linear"])
    ((site, block),) = injection.blocks.items()
    x = draw(injection, 70)
    wanted = torch.tensor(values).repeat(x.numel() // len(values)).view(x.shape)
    with HealthMonitor(injection.blocks) as monitor:
        handle = block.register_forward_hook(lambda block, args, output: (wanted, output[1]), prepend=True)
        block(x)
        handle.remove()
    assert monitor.read()[site].figures["output_not_finite"] == float((~wanted.isfinite()).float().mean())
