"""Token masks and starts: how a call is cut, what is computed together, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from moshi_ttt.core.block import BlockContext, Segments, SiteKind
from moshi_ttt.core.errors import ConfigError, ContextError
from moshi_ttt.core.format import GridFormat, PrefixedGridFormat
from moshi_ttt.core.gated_mlp import output
from moshi_ttt.core.testing.toy_host import ToyMLP
from tests.unit.core.toy import DIM, ToyBlock, toy_block

T, F = True, False


def mask(*rows: list[bool]) -> torch.Tensor:
    return torch.tensor(rows)


def inputs(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, length, DIM, generator=torch.Generator().manual_seed(seed))


class Recording(ToyBlock):
    """Remembers the shape of every call of ``compute``, and whether it had a state."""

    calls: list[tuple[tuple[int, ...], bool]]

    def compute(self, x: Any, state: Any, context: BlockContext) -> Any:
        assert not context.cuts
        assert context.segments is None
        self.calls.append((tuple(x.shape[:2]), state is not None))
        return super().compute(x, state, context)


def recording() -> Recording:
    block = toy_block(cls=Recording)
    assert isinstance(block, Recording)
    block.calls = []
    return block


def pieces(segments: Segments) -> list[tuple[int, list[int], bool, bool]]:
    return [(piece.row, piece.tokens.tolist(), piece.continued, piece.last) for piece in segments.pieces]


def test_a_row_is_cut_at_its_starts_and_without_its_masked_tokens():
    found = Segments.read(
        mask([F, F, T, T, T], [T, T, T, F, T], [F, F, F, F, F], [T, T, T, T, F]),
        mask([F, F, F, F, F], [F, F, T, T, F], [F, T, F, F, F], [T, F, F, F, T]),
    )
    assert pieces(found) == [
        (0, [2, 3, 4], True, True),
        (1, [0, 1], True, False),
        (1, [2], False, False),
        (1, [4], False, True),
        (3, [0, 1, 2, 3], False, False),
    ]
    assert found.begun == (2, 3)
    assert found.num_masked == 2 + 1 + 5 + 1
    assert not found.whole


def test_what_masks_nothing_and_starts_nothing_is_whole():
    everything = torch.ones(2, 3, dtype=torch.bool)
    assert Segments.read(everything, None).whole
    assert Segments.read(None, ~everything).whole
    assert not Segments.read(None, mask([T, F, F], [F, F, F])).whole


def test_an_uncut_call_is_bit_equal_to_one_without_masks():
    block, x = recording(), inputs(2, 5)
    with torch.no_grad():
        expected, state = block(x)
        y, after = block(x, None, BlockContext(token_mask=torch.ones(2, 5, dtype=torch.bool)))
    assert torch.equal(y, expected)
    assert all(torch.equal(after[name], state[name]) for name in state)
    assert block.calls == [((2, 5), False)] * 2


def test_rows_of_one_length_are_computed_together_and_of_nearly_one_where_no_state_is_needed():
    block, x = recording(), inputs(3, 8)
    left = mask([F, F, T, T, T, T, T, T], [T] * 8, [F, F, T, T, T, T, T, T])
    with torch.no_grad():
        y, _ = block(x, None, BlockContext(token_mask=left))
        assert block.calls == [((1, 8), False), ((2, 6), False)]
        block.calls.clear()
        other, after = block(x, None, BlockContext(token_mask=left, want_state=False))
    assert block.calls == [((3, 8), False)]
    assert after == {}
    torch.testing.assert_close(other, y)


def test_pieces_of_very_different_lengths_are_not_padded_to_the_longest():
    block, x = recording(), inputs(2, 8)
    with torch.no_grad():
        block(x, None, BlockContext(token_mask=mask([T] * 8, [F] * 5 + [T] * 3), want_state=False))
    assert block.calls == [((1, 8), False), ((1, 3), False)]


def test_a_step_of_one_token_makes_one_call():
    block = recording()
    state = block.allocate_state(2)
    given = BlockContext(token_mask=mask([T], [F]), starts=mask([F], [T]))
    block.step(inputs(2, 1), state, given)
    assert block.calls == [((2, 1), True)]
    assert state["seen"].tolist() == [1, 0]


def test_one_masked_token_that_is_not_finite_reaches_no_gradient_and_no_state():
    class Projecting(ToyBlock):
        def compute(self, x: Any, state: Any, context: BlockContext) -> Any:
            return x + self.projection(x), super().compute(x, state, context)[1]

    block, x = toy_block(cls=Projecting), inputs(2, 1)
    x[1] = torch.nan
    y, after = block(x, None, BlockContext(token_mask=mask([T], [F])))
    assert torch.equal(y[1].isnan(), torch.ones(1, DIM, dtype=torch.bool)), "its output is the base model's"
    y[0].sum().backward()
    gradients = [parameter.grad for parameter in block.parameters() if parameter.grad is not None]
    assert gradients
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert all(tensor.isfinite().all() for tensor in after.values())


def test_segments_that_a_host_read_are_used_and_the_masks_are_not_read_again():
    block, x, left = recording(), inputs(2, 4), mask([F, T, T, T], [T, T, T, T])
    read = Segments.read(left, None)
    with torch.no_grad():
        expected, _ = block(x, None, BlockContext(token_mask=left))
        unread = BlockContext(token_mask=torch.zeros_like(left), segments=read)  # the segments count
        y, _ = block(x, None, unread)
    assert torch.equal(y, expected)


def test_a_row_that_an_execution_mask_leaves_out_keeps_its_state_and_has_no_start():
    block, x = toy_block(), inputs(2, 3)
    with torch.no_grad():
        _, state = block(x)
        for length in (1, 3):
            starts = torch.ones(2, length, dtype=torch.bool)
            context = BlockContext(starts=starts, exec_mask=torch.tensor([True, False]))
            _, after = block(x[:, :length], state, context)
            for name in state:
                assert torch.equal(after[name][1], state[name][1]), (length, name)
            assert after["seen"].tolist() == [1, 3]
            streamed = {name: tensor.clone() for name, tensor in state.items()}
            block.step(x[:, :length], streamed, context)
            for name in state:
                torch.testing.assert_close(streamed[name], after[name])


def test_a_reset_of_a_row_comes_before_its_tokens():
    block, x = toy_block(), inputs(2, 3)
    left = mask([F, T, T], [T, T, T])
    with torch.no_grad():
        _, state = block(x)
        fresh, _ = block(x, None, BlockContext(token_mask=left))
        y, _ = block(x, state, BlockContext(token_mask=left, reset=torch.tensor([True, True])))
    torch.testing.assert_close(y, fresh)


def test_a_feed_forward_block_gives_the_output_of_either_layout_of_the_hosts_mlp_at_a_masked_token():
    block, x = toy_block(), inputs(1, 3)
    block.kind = SiteKind.FEED_FORWARD  # type: ignore[misc]
    fused = ToyMLP(DIM, torch.float32, "cpu")
    gate, up = fused.linear_in.weight.chunk(2)
    block.info = replace(block.info, mlp=fused)
    expected = block.base_output(x)
    torch.testing.assert_close(expected, fused(x))
    with torch.no_grad():
        y, _ = block(x, None, BlockContext(token_mask=mask([T, F, T])))
    assert torch.equal(y[:, 1], expected[:, 1])

    class Split(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate_proj, self.up_proj, self.down_proj = (torch.nn.Linear(1, 1, bias=False) for _ in range(3))
            self.act_fn = torch.nn.functional.silu
            weights = (gate, up, fused.linear_out.weight)
            for part, weight in zip((self.gate_proj, self.up_proj, self.down_proj), weights, strict=True):
                part.weight = torch.nn.Parameter(weight.detach())

    torch.testing.assert_close(output(Split(), x), expected)
    block.info = replace(block.info, mlp=Split())
    torch.testing.assert_close(block.base_output(x), expected)
    sources = {id(source) for source in block.gradient_sources(x, {}, None)}
    assert {id(parameter) for parameter in block.info.mlp.parameters()} <= sources
    block.info = replace(block.info, mlp=torch.nn.Linear(3, 3))
    with pytest.raises(ConfigError, match=r"GatedMLP.*linear_in.*gate_proj"):
        block.base_output(x)


def test_a_block_at_places_on_a_grid_is_told_the_places_of_the_tokens_that_are_left():
    seen = []

    class Placed(ToyBlock):
        def compute(self, x: Any, state: Any, context: BlockContext) -> Any:
            seen.append(None if context.coordinates is None else context.coordinates.tolist())
            return super().compute(x, state, context)

    block = toy_block(cls=Placed, causal=False)
    block.info = replace(block.info, format=GridFormat())
    x = inputs(2, 4).view(2, 1, 2, 2, DIM)
    with torch.no_grad():
        block(x, None, BlockContext(token_mask=mask([F, T, T, F], [T, T, F, F])))
    assert sorted(seen) == [[[0, 0, 0], [0, 0, 1]], [[0, 0, 1], [0, 1, 0]]]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"token_mask": torch.ones(2, 3)}, r"token_mask.*float32.*one bool per token"),
        ({"token_mask": torch.ones(2, dtype=torch.bool)}, r"token_mask of shape \(2,\)"),
        ({"starts": torch.ones(2, 4, dtype=torch.bool)}, r"starts of shape \(2, 4\)"),
        ({"starts": torch.ones(2, 3, dtype=torch.bool, device="meta")}, r"starts on meta"),
        ({"segments": Segments((2, 3), (), ())}, r"beside these themselves"),
        (
            {"token_mask": torch.ones(2, 3, dtype=torch.bool), "segments": Segments((1, 3), (), ())},
            r"segments of \(1, 3\)",
        ),
    ],
)
def test_masks_that_are_none_are_refused(given, message):
    block = toy_block()
    with pytest.raises(ContextError, match=message):
        block(inputs(2, 3), None, BlockContext(**given))
    with pytest.raises(ContextError, match=message):
        block.step(inputs(2, 3), block.allocate_state(2), BlockContext(**given))


def test_tokens_behind_a_prefix_are_not_cut():
    block = toy_block(causal=False)
    block.info = replace(block.info, format=PrefixedGridFormat(1, 1, 1))
    with pytest.raises(ContextError, match="prefix of 1 tokens"):
        block(inputs(1, 3), None, BlockContext(token_mask=mask([T, T, F])))


def test_masks_without_values_are_refused_where_their_values_are_needed():
    with pytest.raises(ContextError, match="meta device"):
        Segments.read(torch.ones(2, 3, dtype=torch.bool, device="meta"), None)
    with pytest.raises(ContextError, match="token_mask, starts or both"):
        Segments.read(None, None)
    with pytest.raises(ContextError, match="one shape"):
        Segments.read(torch.ones(2, 3, dtype=torch.bool), torch.ones(2, 2, dtype=torch.bool))
