"""The checksum of a file of tensors: it covers every bit of what was written, and files without one are read."""

from __future__ import annotations

import hashlib

import pytest
import torch

from moshi_ttt.core.tensor_files import CHECKSUM, is_damaged, with_checksum

TENSORS = {
    "weight": torch.arange(6.0).view(2, 3),
    "half": torch.ones(3, dtype=torch.bfloat16),
    "number": torch.tensor(7),
    "flag": torch.tensor([True, False]),
    "nothing": torch.zeros(0, 4),
}
METADATA = {"format": "of a test", "version": "1"}


def test_what_was_written_is_whole():
    assert not is_damaged(TENSORS, with_checksum(TENSORS, METADATA))
    reversed_order = dict(reversed(TENSORS.items()))
    assert not is_damaged(reversed_order, with_checksum(TENSORS, METADATA))


def test_the_layout_in_memory_does_not_count():
    transposed = {**TENSORS, "weight": TENSORS["weight"].mT.contiguous().mT}
    assert not transposed["weight"].is_contiguous()
    assert with_checksum(transposed, METADATA) == with_checksum(TENSORS, METADATA)


def test_the_checksum_is_of_names_types_shapes_and_bytes():
    sha = hashlib.sha256(b"'a': 'b'\n'x': torch.int32 (1, 2)\n" + bytes([1, 0, 0, 0, 2, 0, 0, 0]))
    assert with_checksum({"x": torch.tensor([[1, 2]], dtype=torch.int32)}, {"a": "b"})[CHECKSUM] == sha.hexdigest()


@pytest.mark.parametrize("name", [name for name in TENSORS if name != "nothing"])
def test_every_bit_counts(name):
    metadata = with_checksum(TENSORS, METADATA)
    count = TENSORS[name].numel() * TENSORS[name].element_size()
    for bit in range(8 * count):
        other = TENSORS[name].clone()
        other.reshape(-1).view(torch.uint8)[bit // 8] ^= 1 << bit % 8
        assert is_damaged({**TENSORS, name: other}, metadata), bit


@pytest.mark.parametrize(
    "change",
    [
        lambda t, m: ({**t, "weight": t["weight"].view(3, 2)}, m),
        lambda t, m: ({**t, "weight": t["weight"].view(torch.int32)}, m),
        lambda t, m: ({("more" if name == "half" else name): tensor for name, tensor in t.items()}, m),
        lambda t, m: ({name: tensor for name, tensor in t.items() if name != "nothing"}, m),
        lambda t, m: (t, {**m, "version": "2"}),
        lambda t, m: (t, {**m, "more": ""}),
        lambda t, m: (t, {**m, CHECKSUM: ""}),
    ],
    ids=["shape", "dtype", "name", "missing", "metadata", "more metadata", "checksum"],
)
def test_everything_else_counts_too(change):
    assert is_damaged(*change(TENSORS, with_checksum(TENSORS, METADATA)))


def test_files_of_earlier_versions_have_none():
    assert not is_damaged(TENSORS, METADATA)
