"""What the values of a row must be to each other: a state that was damaged or forged is refused before it is used.

A number that no stream has would end the step of all rows: an index beyond a buffer raises, whoever's it is.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from moshi_ttt.core.state_ranges import range_problems
from moshi_ttt.hosts.moshi.stream_values import StreamValue
from moshi_ttt.hosts.moshi.streaming import BlockStreamState

_POSITIONS = ("offset", "offsets", "end_offset")
_GENERATOR_BYTES, _WORDS = 5056, 624
"""Of the state of a generator on the CPU: PyTorch's layout of a Mersenne twister, whose state is 624 words."""


def value_problems(values: Mapping[str, StreamValue], given: Mapping[str, Tensor]) -> Iterator[str]:
    """Why ``given``, of one row, is no state that a stream of ``values`` can be in. Each has its shape and dtype."""
    yield from _block_problems(values, given)
    yield from _position_problems(values, given)
    for name, value in values.items():
        beside = name.removesuffix("cache")
        if value.form == "ring":
            end = int(given[f"{beside}end_offset"])
            expected = min(end, value.owner.capacity)
            if given[name].shape[2] != expected:
                yield f"{name}: it has {given[name].shape[2]} tokens, and a stream of {end} keeps {expected}"
        elif value.form == "tokens" and not value.holds(given[name], given[f"{beside}offsets"]):
            yield f"{name}: the tokens are not those of a stream of {int(given[f'{beside}offsets'])} frames"


def _block_problems(values: Mapping[str, StreamValue], given: Mapping[str, Tensor]) -> Iterator[str]:
    """Of each block's state, as the block declares its ranges."""
    owned: dict[str, dict[str, Tensor]] = {}
    streams: dict[str, BlockStreamState] = {}
    for name, value in values.items():
        stream = value.module._streaming_state
        if isinstance(stream, BlockStreamState) and value.owner is stream.buffers:
            prefix = name.removesuffix(value.key)
            streams[prefix] = stream
            owned.setdefault(prefix, {})[value.key] = given[name][None]  # [...] -> [1, ...]
    for prefix, state in owned.items():
        yield from (prefix + problem for problem in range_problems(streams[prefix].block.state_ranges(), state))


def _position_problems(values: Mapping[str, StreamValue], given: Mapping[str, Tensor]) -> Iterator[str]:
    """All layers of a transformer are at the same token."""
    first: dict[str, str] = {}
    for name, value in values.items():
        if value.key in _POSITIONS:
            part = "lm" if name.startswith("lm/") else name.partition(".")[0]
            other = first.setdefault(part, name)
            if int(given[name]) != int(given[other]):
                yield f"{name} is {int(given[name])} and {other} is {int(given[other])}: they are equal in every stream"


def generator_problem(state: Tensor) -> str | None:
    """Why ``state`` is not that of a generator on the CPU, or None.

    PyTorch checks that the numbers that are left are not too many, and not that they lie where the next one is taken.
    """
    try:
        torch.Generator().set_state(state)
    except (RuntimeError, TypeError):
        return "it is not the state of a generator"
    if state.numel() != _GENERATOR_BYTES:
        return f"it has {state.numel()} bytes, and this version of PyTorch keeps {_GENERATOR_BYTES}"
    left, _, following = struct.unpack_from("<iiQ", state.numpy().tobytes(), 8)
    if (left, following) != (1, 0) and left + following != _WORDS + 1:
        return f"it is not the state of a generator: {left} numbers are left, and number {following} comes next"
    return None
