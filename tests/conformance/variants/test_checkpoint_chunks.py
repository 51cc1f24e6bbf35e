"""Groups of chunks that the backward pass computes again: the same numbers, and less kept between the passes."""

from __future__ import annotations

import math
from unittest import mock

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from moshi_ttt.core.config_parsing import parse_block
from moshi_ttt.core.device_log import DeviceLog
from moshi_ttt.core.errors import ConfigError
from moshi_ttt.core.registry import default_registry
from moshi_ttt.core.testing import Shape, default_cases
from moshi_ttt.plugins.hybrid import chunk, chunk_groups

CASES = [
    ("ttt_linear", {"chunk": 4}),
    ("ttt_linear", {"chunk": 4, "bidirectional": True}),
    ("ttt_mlp", {"chunk": 5}),
    ("ttt_mlp", {"chunk": 4, "causal": False}),
    ("ttt_multilayer", {"chunk": 4, "expansion": 2}),
]
GROUPS = [(torch.float64, 2), (torch.float32, 1), (torch.float32, 3), (torch.bfloat16, 50)]


def case_of(variant, options, dtype=torch.float32, **shape):
    (found,) = (case for case in default_cases(variant, [options]) if case.dtype == dtype)
    return found.at(shape=Shape(**{"dim": 16, "heads": 2, "batch": 2, **shape}))


def computed(case, length, start=None, around=False):
    """Outputs, final state and gradients of input and parameters."""
    block, x = case.block(), case.inputs(length).requires_grad_()

    def call(x):
        y, after = case.call(block, x, start)
        return y, *(tensor for tensor in after.values() if tensor.requires_grad)

    y, *learned = checkpoint(call, x, use_reentrant=False) if around else call(x)
    loss = y.float().square().sum()
    if block.causal:
        loss = loss + sum(tensor.float().square().sum() for tensor in learned)
    gradients = torch.autograd.grad(loss, [x, *block.parameters()], materialize_grads=True)
    return [tensor.detach() for tensor in (y, *learned)] + list(gradients)


@pytest.mark.each_kind
@pytest.mark.parametrize(("dtype", "chunks"), GROUPS, ids=str)
@pytest.mark.parametrize(("variant", "options"), CASES, ids=str)
def test_nothing_changes_bit_for_bit(variant, options, dtype, chunks):
    """From the start and from a state whose rows stand at different places, alone and under checkpointing around it."""
    plain = case_of(variant, options, dtype)
    grouped = case_of(variant, {**options, "checkpoint_chunks": chunks}, dtype)
    starts = [None]
    if plain.causal:
        with torch.no_grad():
            block = plain.block()
            begun = plain.call(block, plain.inputs(3, seed=4))[1]
            rows = torch.tensor([True, False])
            starts.append(plain.call(block, plain.inputs(5, seed=5), begun, exec_mask=rows)[1])
    for length in (3, 16, 22):
        for start in starts:
            expected = computed(plain, length, start)
            for around in (False, True):
                found = computed(grouped, length, start, around)
                assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def bytes_of(case, length, start=None, want_state=False):
    """Kept for the backward pass with the output, and the most that the backward pass holds."""
    block, x = case.block(), case.inputs(length).requires_grad_()
    with DeviceLog("cpu") as log:
        y = case.call(block, x, start, want_state=want_state)[0]
        kept = log.bytes
        log.peak = log.bytes
        y.sum().backward()
    return kept, log.peak


@pytest.mark.first_by_default
@pytest.mark.parametrize("carried", [False, True])
@pytest.mark.parametrize(("variant", "layers"), [("ttt_linear", 1), ("ttt_mlp", 2)])
def test_what_is_kept_is_tokens_and_the_fast_weights_between_groups(variant, layers, carried):
    """Bounds from the definition: a group's chunks leave nothing but what the next group starts from.

    Without groups N chunks keep about sqrt(N) sets of fast weights, and what each chunk computed. So groups of G keep
    at least sqrt(N) - N/G sets less, and what is kept grows with the number of groups by a set of fast weights (and, in
    a call that continues a state, by nothing else).
    """
    chunk, count, dim, heads, batch = 4, 12, 32, 2, 2
    width = dim // heads
    sizes = [width * width] if layers == 1 else [4 * width * width] * 2
    biases = [width] if layers == 1 else [4 * width, width]
    weights = 4 * batch * heads * (sum(sizes) + sum(biases))
    kept, peak = {}, {}
    for chunks in (None, 1, 2, 3, 4, 6, 12):
        case = case_of(variant, {"chunk": chunk, "checkpoint_chunks": chunks}, dim=dim, heads=heads, batch=batch)
        start = None
        if carried:
            with torch.no_grad():
                start = case.call(case.block(), case.inputs(chunk + 2, seed=3))[1]
        kept[chunks], peak[chunks] = bytes_of(case, chunk * count, start)
    groups = {chunks: -(-(count + carried) // chunks) for chunks in kept if chunks}
    for chunks, number in groups.items():
        assert kept[None] - kept[chunks] >= (math.isqrt(count) - number) * weights
        assert abs(kept[chunks] - kept[12] - (number - groups[12]) * weights) <= 0.02 * weights * count
    assert kept[12] < kept[None] - weights
    # A backward pass holds what is kept, one group's chunks as if they were not grouped, and gradients beside.
    within = (kept[None] - kept[12]) / count + weights
    rest = peak[None] - kept[None] + weights
    for chunks in (1, 2, 3, 4, 6):
        assert peak[chunks] <= kept[chunks] + (chunks + 1) * within + rest
        assert peak[chunks] < peak[None]


@pytest.mark.parametrize("carried", [False, True])
def test_inside_another_checkpoint_the_groups_keep_nothing(carried):
    """Until it is computed again, a call in a checkpoint has its input and its output alone, grouped or not."""
    kept = []
    for chunks in (None, 2):
        case = case_of("ttt_mlp", {"chunk": 4, "checkpoint_chunks": chunks}, dim=32)
        block, x = case.block(), case.inputs(48).requires_grad_()
        start = None
        if carried:
            with torch.no_grad():
                start = case.call(block, case.inputs(6, seed=3))[1]
        with DeviceLog("cpu") as log:
            y = checkpoint(lambda x: case.call(block, x, start, want_state=False)[0], x, use_reentrant=False)  # noqa: B023
            kept.append(log.bytes)
        y.sum().backward()
    rows, tokens, width = 2, 48, 32
    assert kept[0] >= 4 * rows * tokens * width
    # Masks and counters, less than 32 bytes a token where one activation has 128.
    assert kept[1] - kept[0] < 32 * rows * tokens


def test_without_gradients_there_is_nothing_to_keep_and_nothing_is_wrapped(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("checkpointed without need")

    monkeypatch.setattr(chunk, "checkpoint", refuse)
    monkeypatch.setattr(chunk_groups.Kept, "tensors", refuse)
    case = case_of("ttt_mlp", {"chunk": 4, "checkpoint_chunks": 2})
    block = case.block()
    with torch.no_grad():
        case.call(block, case.inputs(11))
        streamed = block.allocate_state(2)
        for t in range(9):
            case.step(block, case.inputs(9)[:, t : t + 1], streamed)
    case.call(block.requires_grad_(False), case.inputs(11))
    plain = case_of("ttt_mlp", {"chunk": 4, "checkpoint_chunks": 2, "momentum": 0.5})
    for other, options in ((plain, {}), (case_of("ttt_mlp", {"chunk": 4}), {})):
        with pytest.raises(AssertionError, match="without need"):
            other.call(other.block(), other.inputs(11), **options)


@pytest.mark.parametrize("chunks", [0, -1, 1.5, True, "all"])
def test_a_number_of_chunks_that_is_none_is_refused(chunks):
    with pytest.raises(ConfigError, match="checkpoint_chunks"):
        parse_block({"variant": "ttt_mlp", "checkpoint_chunks": chunks}, registry=default_registry())


def test_in_place_learning_has_no_such_option():
    with pytest.raises(ConfigError, match="unknown key 'checkpoint_chunks'"):
        parse_block({"variant": "gating_mlp", "checkpoint_chunks": 2}, registry=default_registry())


@pytest.mark.exhaustive  # torch compiles for seconds; without compiling, the groups are compared above
def test_a_compiled_block_computes_the_groups_too():
    case = case_of("ttt_mlp", {"chunk": 4, "checkpoint_chunks": 2}, torch.float64)
    block, x = case.block(), case.inputs(13).requires_grad_()  # two groups, of 8 and of 5 tokens

    def results():
        y = case.call(block, x)[0]
        return [y.detach(), *torch.autograd.grad(y.square().sum(), [x, *block.parameters()])]

    expected, real = results(), torch.compile

    def traced(function, dynamic):
        return real(function, backend="aot_eager", dynamic=dynamic, fullgraph=True)

    with mock.patch("torch.compile", traced):
        block.compile_compute()
    assert all(torch.allclose(a, b, rtol=0, atol=1e-12) for a, b in zip(results(), expected, strict=True))
