"""The chunk form in C++: values and every gradient are torch's, wherever a call begins and ends; what it refuses."""

from __future__ import annotations

from copy import copy
from itertools import pairwise

import pytest
import torch

from moshi_ttt.core.errors import MoshiTTTError
from moshi_ttt.core.format import ChunkLayout
from moshi_ttt.core.testing import error
from moshi_ttt.plugins.common import instructions, native
from moshi_ttt.plugins.hybrid import chunk, compiled
from moshi_ttt.plugins.hybrid.chunk import chunk_inner_loop
from moshi_ttt.plugins.hybrid.cpp import chunk as cpp
from moshi_ttt.plugins.hybrid.cpp.chunk import cpp_inner_loop
from moshi_ttt.plugins.hybrid.fast_network import UpdateRule
from moshi_ttt.plugins.hybrid.inner_loop import Tokens, initial_state
from moshi_ttt.plugins.hybrid.naive import naive_inner_loop
from moshi_ttt.plugins.hybrid.objective import InnerNorm, PlainLoss
from tests.unit.plugins.inner_calls import by_torch, results

DEPTHS = [(4, 4), (4, 16, 4), (4, 8, 12, 4)]


def largest(found, expected):
    return max(error(a, b) for a, b in zip(found, expected, strict=True))


def compare(monkeypatch, widths, length, limit=1e-11, **options):
    together = options.pop("together", None)
    values, gradients = results(widths, length, form=cpp_inner_loop, together=together, **options)
    expected, expected_gradients = by_torch(monkeypatch, widths, length, **options)
    assert largest(values, expected) < limit
    assert largest(gradients, expected_gradients) < limit


@pytest.mark.parametrize("together", [None, 1, 3])
@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize("length", [1, 3, 13, 16])
@pytest.mark.parametrize("widths", DEPTHS)
def test_every_gradient_is_that_of_torch(widths, length, begun, together, monkeypatch):
    compare(monkeypatch, widths, length, begun=begun, together=together)


@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize("widths", DEPTHS)
def test_without_the_causal_mask_too(widths, begun, monkeypatch):
    compare(monkeypatch, widths, 13, causal=False, begun=begun)


@pytest.mark.parametrize("size", [1, 5, 16, 19, 33])
@pytest.mark.parametrize("widths", [(20, 20), (20, 70, 20), (33, 130, 33)])
def test_sizes_that_are_no_multiple_of_a_vector(widths, size, monkeypatch):
    compare(monkeypatch, widths, 40, size=size, begun=size > 1, limit=1e-10)


@pytest.mark.parametrize("only", ["y", "weight.1", "bias.0", "gradient.0", "input.1"])
def test_the_gradient_of_one_result(only, monkeypatch):
    compare(monkeypatch, (4, 8, 4), 10, begun=True, only=only)


def test_float32_is_near_float64():
    for widths in ((16, 16), (16, 64, 16)):
        given = {"form": cpp_inner_loop, "begun": True, "size": 16}
        values, gradients = results(widths, 50, dtype=torch.float32, **given)
        expected, expected_gradients = results(widths, 50, **given)
        torch_form, torch_gradients = results(widths, 50, dtype=torch.float32, begun=True, size=16)
        assert largest(values, expected) < max(2e-5, 4 * largest(torch_form, expected))
        assert largest(gradients, expected_gradients) < max(2e-5, 4 * largest(torch_gradients, expected_gradients))


@pytest.mark.parametrize("widths", DEPTHS)
def test_the_definition(widths):
    generator = torch.Generator().manual_seed(3)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    q, k, v = (random(2, 3, 11, widths[0]) for _ in range(3))
    lr, scale = random(2, 3, 11).abs(), random(4).abs()
    norm = InnerNorm(random(3, widths[0]), random(3, widths[0]), 1e-6)
    weights = tuple(random(3, a, b) / a**0.5 for a, b in pairwise(widths))
    biases = tuple(random(3, 1, b) for b in widths[1:])
    expected, after, _ = naive_inner_loop(
        q, k, v, lr, scale, norm.weight, norm.bias, weights, biases, chunk_size=4, eps=1e-6, causal=True
    )
    tokens = Tokens(*(each.transpose(1, 2) for each in (q, k, v, lr)))
    y, state = cpp_inner_loop(
        tokens, initial_state(weights, biases, 4, 2), norm, scale, layout=ChunkLayout(11, 4)
    )  # fmt: skip
    assert error(y, expected.transpose(1, 2).flatten(2)) < 1e-10
    assert largest([state[f"weight.{i}"] for i in range(len(weights))], after) < 1e-10


class Problem:
    """A small call in float64 by default; ``state`` is where it starts."""

    def __init__(self, widths=(3, 7, 3), length=9, size=4, batch=2, heads=2, dtype=torch.float64):
        generator = torch.Generator().manual_seed(5)

        def random(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

        self.length, self.size = length, size
        self.tokens = Tokens(*(random(batch, length, heads, widths[0]) for _ in range(3)), random(batch, length, heads))
        self.norm = InnerNorm(random(heads, widths[0]), random(heads, widths[0]), 1e-6)
        self.scale = random(size)
        weights = tuple(random(heads, a, b) / a**0.5 for a, b in pairwise(widths))
        self.state = initial_state(weights, tuple(random(heads, 1, b) for b in widths[1:]), size, batch)

    def run(self, form=cpp_inner_loop, **options):
        layout = ChunkLayout(self.tokens.q.shape[1], self.size, offset=options.pop("offset", None))
        return form(self.tokens, self.state, self.norm, self.scale, layout=layout, **options)


def test_gradcheck():
    problem = Problem(length=6)
    learned = [problem.state["weight.0"].contiguous(), problem.state["bias.1"].contiguous()]
    leaves = [each.detach().requires_grad_() for each in (*problem.tokens, *problem.norm.learned, *learned)]

    def call(q, k, v, lr, gamma, beta, weight, bias):
        problem.tokens, problem.norm = Tokens(q, k, v, lr), InnerNorm(gamma, beta, 1e-6)
        problem.state |= {"weight.0": weight, "bias.1": bias}
        y, after = problem.run()
        return y, after["weight.0"], after["gradient.0"]

    assert torch.autograd.gradcheck(call, leaves, fast_mode=True)


@pytest.mark.parametrize("widths", DEPTHS)
def test_how_many_chunks_are_kept_changes_no_bit(widths):
    """Nor whether anything is differentiated, nor the number of threads."""
    before = torch.get_num_threads()
    try:
        found = []
        for together, threads in ((None, 1), (None, 2), (1, 1), (2, 2), (100, 1)):
            torch.set_num_threads(threads)
            values, gradients = results(
                widths, 30, form=cpp_inner_loop, begun=True, together=together, dtype=torch.float32
            )  # fmt: skip
            found.append(values + gradients)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_rows_and_heads_are_shared_out_over_threads():
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            assert cpp.operations().parts(64) == threads
    finally:
        torch.set_num_threads(before)


def test_a_call_without_gradients_computes_the_same_bits():
    problem = Problem(dtype=torch.float32)
    y, after = problem.run()
    problem.tokens.q.requires_grad_()
    again, after_again = problem.run()
    assert again.requires_grad
    assert not y.requires_grad
    assert torch.equal(y, again)
    assert all(torch.equal(after[name], after_again[name]) for name in after)


def test_a_row_alone_has_the_same_bits():
    problem = Problem(batch=3, dtype=torch.float32)
    whole, _ = problem.run()
    for row in range(3):
        alone = copy(problem)
        alone.tokens = Tokens(*(each[row : row + 1] for each in problem.tokens))
        alone.state = {name: each[row : row + 1] for name, each in problem.state.items()}
        assert torch.equal(alone.run()[0], whole[row : row + 1])


@pytest.mark.parametrize("cuts", [[1, 2, 3, 4, 5], [4], [3, 8], [7]])
def test_a_call_in_pieces_is_one_call(cuts):
    problem = Problem(length=11)
    expected, after = problem.run()
    state, pieces = problem.state, []
    for start, stop in zip([0, *cuts], [*cuts, 11], strict=True):
        piece = copy(problem)
        piece.tokens, piece.state = Tokens(*(each[:, start:stop] for each in problem.tokens)), state
        y, state = piece.run(offset=state["position"])
        pieces.append(y)
    assert error(torch.cat(pieces, 1), expected) < 1e-12
    assert all(error(state[name], after[name]) < 1e-12 for name in after)


def test_a_token_that_is_not_finite_takes_no_part():
    problem = Problem(length=10)
    problem.tokens.v[0, 2, 1] = torch.nan
    found, expected = problem.run(), problem.run(chunk_inner_loop)
    rows = torch.ones(2, 10, dtype=torch.bool)
    rows[0, 2] = False
    assert error(found[0][rows], expected[0][rows]) < 1e-12
    assert found[1]["skipped"].tolist() == [1, 0]
    assert all(error(found[1][name], expected[1][name]) < 1e-12 for name in expected[1])


def test_slots_without_a_token_are_not_read():
    values, gradients = results((4, 8, 4), 9, form=cpp_inner_loop, begun=True)
    again, gradients_again = results((4, 8, 4), 9, form=cpp_inner_loop, begun=True, gap=torch.nan)
    assert all(torch.equal(a, b) for a, b in zip(values + gradients, again + gradients_again, strict=True))


def test_tokens_may_lie_in_any_order():
    problem = Problem()
    expected, _ = problem.run()
    flipped = (each.movedim(-1, 0).contiguous().movedim(0, -1) for each in problem.tokens)
    problem.tokens = Tokens(*flipped)
    assert torch.equal(problem.run()[0], expected)


def test_what_it_is_given_is_not_written_to():
    problem = Problem()
    before = [each.clone() for each in (*problem.tokens, *problem.state.values())]
    problem.run()
    assert all(torch.equal(a, b) for a, b in zip(before, (*problem.tokens, *problem.state.values()), strict=True))


def test_without_values_it_gives_the_shapes():
    problem = Problem()
    expected = problem.run()
    with torch._subclasses.FakeTensorMode() as mode:
        problem.tokens = Tokens(*(mode.from_tensor(each).requires_grad_() for each in problem.tokens))
        problem.state = {name: mode.from_tensor(each) for name, each in problem.state.items()}
        problem.norm = InnerNorm(*(mode.from_tensor(each) for each in problem.norm.learned), 1e-6)
        problem.scale = mode.from_tensor(problem.scale)
        y, after = problem.run()
        (gradient,) = torch.autograd.grad(y.sum(), problem.tokens.k)
    assert y.shape == expected[0].shape
    assert {name: each.shape for name, each in after.items()} == {n: each.shape for n, each in expected[1].items()}
    assert gradient.shape == problem.tokens.k.shape


@pytest.mark.parametrize("widths", [(32, 32), (32, 128, 32)])
@pytest.mark.parametrize("together", [None, 16])
def test_little_is_kept_between_the_passes(widths, together, monkeypatch):
    """Beyond the call's tokens, at most a third of what torch's own backward pass keeps."""
    kept = []
    for form in (chunk_inner_loop, cpp_inner_loop):
        problem = Problem(widths, length=512, size=16, dtype=torch.float32)
        for each in problem.tokens:
            each.requires_grad_()
        storages = {}

        def keep(x, storages=storages):
            storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with monkeypatch.context() as patch, torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            patch.setattr(chunk, "is_written_out", lambda *_: False)
            y, after = problem.run(form, checkpoint_chunks=together if form is cpp_inner_loop else None)
        for each in problem.tokens:
            storages.pop(each.untyped_storage().data_ptr(), None)
        kept.append(sum(storages.values()))
        del y, after
    assert kept[1] < kept[0] / 3


# ---- refusals


@pytest.mark.parametrize(
    ("norm", "rule"),
    [
        (PlainLoss(), None),
        (None, UpdateRule(steps=2)),
        (None, UpdateRule(momentum=torch.full((1, 1, 1), 0.5, dtype=torch.float64))),
    ],
    ids=["no inner LayerNorm", "two steps", "momentum"],
)
def test_other_inner_loops_are_refused(norm, rule):
    problem = Problem()
    problem.norm = problem.norm if norm is None else norm
    with pytest.raises(ValueError, match="is for the published form"):
        problem.run(rule=rule)


@pytest.mark.parametrize("position", [-1, 4])
def test_a_position_outside_the_chunk_is_refused(position):
    problem = Problem()
    with pytest.raises((RuntimeError, IndexError), match=r"'position' is|out of bounds"):
        problem.run(offset=torch.tensor([0, position]))


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("weight.1", lambda x: x[:, :, :5], r"'weight' is Double \[2, 2, 5, 3\].*takes Double \[2, 2, 7, 3\]"),
        ("bias.0", lambda x: x.float(), r"'bias' is Float"),
        ("input.1", lambda x: x[:, :, :3], r"'input' is Double \[2, 2, 3, 7\]"),
        ("gradient.0", lambda x: x[:, :1], r"'gradient' is Double \[2, 1, 4, 7\]"),
    ],
)
def test_a_state_of_another_shape_is_refused(name, change, said):
    problem = Problem()
    problem.state[name] = change(problem.state[name])
    with pytest.raises(RuntimeError, match=said):
        problem.run()


def test_without_a_compiler_the_message_says_what_is_needed(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("CXX", str(tmp_path / "no-compiler"))
    monkeypatch.setattr(cpp, "operations", cpp.operations.__wrapped__)
    with pytest.raises(MoshiTTTError, match=r"compiled inner loop of the hybrid layer cannot be built.*no-compiler"):
        Problem().run()


def test_every_header_is_in_the_version(monkeypatch, tmp_path):
    """A header that is forgotten would leave an old build in use; test_native.py looks at what each file includes."""
    folder, listed = cpp.LIBRARY.source.parent, {*cpp.LIBRARY.headers, *compiled.LIBRARY.headers}
    assert {path for path in listed if path.parent != native.COMMON} == set(folder.glob("*.h"))
    before = cpp.LIBRARY.version()
    monkeypatch.setattr(instructions, "CPUINFO", tmp_path / "cpuinfo")
    (tmp_path / "cpuinfo").write_text("processor: 0\nflags\t\t: fpu sse2 other\n", encoding="utf-8")
    assert cpp.LIBRARY.version() != before
