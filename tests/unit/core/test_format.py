"""Tensor layouts: chunks and back, padding, rows that continue a chunk."""

from __future__ import annotations

import pytest
import torch

from moshi_ttt.core.format import ChunkLayout, GridFormat, PrefixedGridFormat, SequenceFormat

HEADS, WIDTH = 2, 6


def tokens(batch: int, length: int) -> torch.Tensor:
    """Every value different and none of them zero, so that padding can be told apart."""
    return 1 + torch.arange(batch * length * WIDTH, dtype=torch.float64).view(batch, length, WIDTH)


@pytest.mark.parametrize("num_heads", [None, HEADS])
@pytest.mark.parametrize("offset", [None, (0, 0), (0, 3), (2, 1)])
@pytest.mark.parametrize("length", [1, 3, 4, 5, 8, 11])
def test_merge_inverts_split(length, offset, num_heads):
    x = tokens(2, length)
    layout = ChunkLayout(length, 4, offset=None if offset is None else torch.tensor(offset))
    chunks = layout.split(x, num_heads)
    head_shape = (2, layout.num_chunks, 4, WIDTH) if num_heads is None else (2, HEADS, layout.num_chunks, 4, 3)
    assert chunks.shape == head_shape
    assert torch.equal(layout.merge(chunks), x)


@pytest.mark.parametrize("offset", [None, (0, 3)])
def test_padding_is_zero_and_masked(offset):
    x = tokens(2, 5)
    layout = ChunkLayout(5, 4, offset=None if offset is None else torch.tensor(offset))
    chunks = layout.split(x)
    valid = layout.valid.expand(2, -1, -1)
    assert torch.equal(chunks != 0, valid[..., None].expand_as(chunks))
    assert valid.sum() == 2 * 5


def test_offset_places_each_row_in_its_own_chunk():
    x = tokens(2, 3)
    layout = ChunkLayout(3, 4, offset=torch.tensor([0, 2]))
    chunks = layout.split(x)
    assert torch.equal(chunks[0, 0, :3], x[0])
    assert torch.equal(chunks[1, 0, 2:], x[1, :2])
    assert torch.equal(chunks[1, 1, 0], x[1, 2])


def test_number_of_chunks_does_not_depend_on_the_offsets():
    counts = {ChunkLayout(5, 4, offset=torch.tensor([o])).num_chunks for o in range(4)}
    assert counts == {2}
    assert ChunkLayout(6, 4, offset=torch.tensor([0])).num_chunks == 3


@pytest.mark.parametrize(
    ("length", "chunk", "offset", "full"), [(8, 4, None, True), (9, 4, None, False), (8, 4, torch.tensor([0]), False)]
)
def test_full_means_no_padding_known_without_reading_a_tensor(length, chunk, offset, full):
    assert ChunkLayout(length, chunk, offset=offset).full is full


@pytest.mark.parametrize("offset", [None, (0, 3)])
def test_gradients_pass_through_split_and_merge(offset):
    x = tokens(2, 5).requires_grad_()
    layout = ChunkLayout(5, 4, offset=None if offset is None else torch.tensor(offset))
    factor = torch.randn(2, 5, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    (layout.merge(layout.split(x, HEADS)) * factor).sum().backward()
    assert torch.equal(x.grad, factor)


@pytest.mark.parametrize("offset", [None, (0, 3)])
def test_poisoned_padding_never_reaches_a_token(offset):
    x = tokens(2, 5)
    layout = ChunkLayout(5, 4, offset=None if offset is None else torch.tensor(offset))
    chunks = layout.split(x)
    chunks = torch.where(layout.valid[..., None], chunks, float("nan"))
    assert torch.equal(layout.merge(chunks), x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtype_is_kept(dtype):
    layout = ChunkLayout(5, 4, offset=torch.tensor([1]))
    assert layout.split(tokens(1, 5).to(dtype), HEADS).dtype == dtype


@pytest.mark.parametrize(("length", "chunk"), [(0, 4), (4, 0), (-1, 4)])
def test_nothing_to_lay_out_raises(length, chunk):
    with pytest.raises(ValueError, match="at least one token"):
        ChunkLayout(length, chunk)


def test_another_length_raises():
    with pytest.raises(ValueError, match="for 5 tokens, got 6"):
        ChunkLayout(5, 4).split(tokens(1, 6))


@pytest.mark.parametrize("shape", [(4,), (2, 3), (2, 3, 4, 5)])
def test_sequence_format_refuses_what_is_not_a_sequence(shape):
    with pytest.raises(ValueError, match=r"\[B, T, D\]"):
        SequenceFormat().to_tokens(torch.zeros(shape))


def test_sequence_format_is_a_view():
    x = tokens(2, 5)
    adapter = SequenceFormat()
    assert adapter.to_tokens(x).data_ptr() == x.data_ptr()
    assert adapter.from_tokens(x, like=x).data_ptr() == x.data_ptr()
    assert adapter.chunks(x, 4).num_chunks == 2


def test_a_grid_is_tokens_in_the_order_time_row_column_and_back():
    grid = torch.arange(2 * 3 * 4 * 5 * 6, dtype=torch.float64).view(2, 3, 4, 5, 6)
    tokens = GridFormat().to_tokens(grid)
    assert tokens.shape == (2, 60, 6)
    assert torch.equal(tokens[1, (2 * 4 + 3) * 5 + 1], grid[1, 2, 3, 1])
    assert torch.equal(GridFormat().from_tokens(tokens, grid), grid)
    with pytest.raises(ValueError, match=r"Expected activations \[B, T, H, W, D\], got shape \(2, 60, 6\)"):
        GridFormat().to_tokens(tokens)


def test_a_prefix_is_at_the_origin_and_the_grid_behind_it_at_its_places():
    layout, x = PrefixedGridFormat(2, 3, 4), torch.randn(2, 2 + 24, 5)
    assert layout.to_tokens(x) is x
    assert layout.from_tokens(x, x) is x
    assert layout.prefix(x) == 2
    where = layout.coordinates(x)
    assert where[:2].tolist() == [[0, 0, 0]] * 2
    assert torch.equal(where[2:], GridFormat().coordinates(torch.empty(1, 2, 3, 4, 1)))
    assert GridFormat().prefix(torch.empty(1, 2, 3, 4, 1)) == SequenceFormat().prefix(x) == 0


@pytest.mark.parametrize("shape", [(2, 2, 5), (2, 13, 5), (2, 14), (2, 2, 3, 4, 5)], ids=str)
def test_a_prefixed_grid_refuses_what_is_no_whole_number_of_frames(shape):
    with pytest.raises(ValueError, match=r"Expected activations \[B, 2 \+ T \* 12, D\] with T of 1 or more"):
        PrefixedGridFormat(2, 3, 4).to_tokens(torch.randn(shape))


@pytest.mark.parametrize("sizes", [(-1, 3, 4), (0, 0, 4), (0, 3, -4)], ids=str)
def test_a_prefixed_grid_of_no_size_is_refused(sizes):
    with pytest.raises(ValueError, match="give a prefix of 0 or more, and 1 or more for each side"):
        PrefixedGridFormat(*sizes)
