"""Streams against the definition: each row's own tokens, replayed one by one."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from moshi_ttt.core import state as states
from moshi_ttt.core.block import BlockContext, SequenceBlock
from moshi_ttt.core.errors import ConfigError
from moshi_ttt.core.state import BlockState
from tests.fuzz.cases import Call, CompileStep, Layer, Reload, Reset, Schedule, Stream, alternated
from tests.fuzz.comparison import check, error
from tests.fuzz.configurations import memory, updates
from tests.fuzz.definition import HybridStream
from tests.fuzz.ridge import RidgeStream

BOUNDS = {"float64": 1e-10, "float32": 1e-4}
"""float32 is compared with the float64 definition on the same rounded values, as the reference vectors are."""


class Tokens:
    """Random tokens and input embeddings, ``[B, T, D]`` at a time, as exact values of a dtype."""

    LONGEST = 700
    """Tokens that a schedule has at most: 24 calls of 27."""

    def __init__(self, batch: int, width: int, dtype: torch.dtype, seed: int, alternating: float | None = None) -> None:
        generator = torch.Generator().manual_seed(seed)
        x, embeddings = torch.randn((2, batch, self.LONGEST, width), generator=generator, dtype=torch.float64)
        if alternating is not None:
            x, embeddings = alternated(x, embeddings, alternating).values()
        self.x, self.embeddings, self.heard = x.to(dtype), embeddings.to(dtype), 0

    def next(self, length: int) -> tuple[Tensor, Tensor]:
        begin, self.heard = self.heard, self.heard + length
        return self.x[:, begin : self.heard].contiguous(), self.embeddings[:, begin : self.heard].contiguous()


class Rows:
    """The definition for every row: a stream each, begun anew where the row is reset."""

    def __init__(self, layer: Layer, batch: int, dtype: torch.dtype) -> None:
        values = {**layer.parameters(), **layer.host_parameters()}
        rounded = {name: value.to(dtype).double() for name, value in values.items()}
        self.layer, self.definition = layer, layer.definition(rounded, keep_graph=False)
        self.streams: list[Stream] = [layer.stream(self.definition) for _ in range(batch)]

    def reset(self, rows: Sequence[bool]) -> None:
        fresh = [self.layer.stream(self.definition) for _ in rows]
        self.streams = [new if anew else old for anew, new, old in zip(rows, fresh, self.streams, strict=True)]

    def hear(self, row: int, x: Tensor, embeddings: Tensor, learns: bool, spoiled: int | None = None) -> Tensor:
        """``x`` and ``embeddings [T, D]`` of one row. Token ``spoiled`` of them reaches no later one but as zero."""
        stream, outputs = self.streams[row], []
        for index, token in enumerate(zip(x.double(), embeddings.double(), strict=True)):
            if isinstance(stream, HybridStream | RidgeStream):
                outputs.append(stream.hear(*token, learns, spoiled=index == spoiled).detach())
            else:
                outputs.append(stream.hear(*token, learns).detach())
        return torch.stack(outputs)

    def memory(self) -> dict[str, Tensor]:
        ends = [stream.memory() for stream in self.streams]
        return {name: torch.stack([end[name] for end in ends]).detach() for name in ends[0]}


def check_schedule(case: Schedule) -> None:
    """Raises AssertionError at the first event whose outputs are not the definition's, or for the final memory."""
    layer, batch, dtype = case.layer, case.batch, case.torch_dtype
    block, rows = layer.block(dtype), Rows(layer, batch, dtype)
    state, tokens = block.allocate_state(batch), Tokens(batch, layer.width, dtype, case.seed, case.alternating)
    compiled = False  # a restored stream goes on in the form it was in
    for index, event in enumerate(case.events):
        match event:
            case Reset(anew):
                block.reset_state(state, torch.tensor(anew))
                rows.reset(anew)
            case Reload():
                state = reloaded(state)
                block = layer.block(dtype)
                compiled = compiled and compile_step(block)
            case CompileStep():
                compiled = compile_step(block)
            case Call():
                x, embeddings = tokens.next(event.tokens)
                y, state = call(block, state, event, x, embeddings)
                rows.reset(event.resets or (False,) * batch)
                check(_wrong_outputs(case, rows, event, (x, embeddings, y), f"event {index}"))
    check(_wrong_memory(case, rows, block, state))


def call(
    block: SequenceBlock, state: BlockState, event: Call, x: Tensor, embeddings: Tensor
) -> tuple[Tensor, BlockState]:
    context = BlockContext(
        input_embeddings=embeddings,
        exec_mask=None if event.runs is None else torch.tensor(event.runs),
        reset=None if event.resets is None else torch.tensor(event.resets),
        updates=updates(event.learns),
    )
    if event.in_place:
        return block.step(x, state, context), state
    with torch.no_grad():
        y, after = block(x, state, context)
    return y, states.clone(after)


def reloaded(state: BlockState) -> BlockState:
    """Through a file, in buffers of its own."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "state.safetensors"
        save_file(state, path)
        return states.clone(load_file(path))


def compile_step(block: SequenceBlock) -> bool:
    """False where the variant has no compiled step."""
    try:
        block.compile_step()
    except ConfigError as refused:
        if "has no compiled step" not in str(refused):
            raise
        return False
    return True


def _wrong_outputs(
    case: Schedule, rows: Rows, event: Call, heard: tuple[Tensor, Tensor, Tensor], where: str
) -> list[str]:
    x, embeddings, y = heard
    learns = (event.learns,) * case.batch if isinstance(event.learns, bool) else event.learns
    found = []
    for row in range(case.batch):
        if event.runs is not None and not event.runs[row]:
            continue
        expected = rows.hear(row, x[row], embeddings[row], learns[row])
        if not (wrong := error(y[row], expected)) <= BOUNDS[case.dtype]:
            found.append(f"{where}, row {row}: error {wrong:.3g}, above {BOUNDS[case.dtype]:g}")
    return found


def _wrong_memory(case: Schedule, rows: Rows, block: SequenceBlock, state: BlockState) -> list[str]:
    found, expected = memory(block, state), rows.memory()
    problems = [] if found.keys() == expected.keys() else [f"memory {sorted(found)}, expected {sorted(expected)}"]
    if int(block.skipped_updates(state).sum()):
        problems.append("updates were skipped")
    for name in found.keys() & expected.keys():
        if not (wrong := error(found[name], expected[name])) <= BOUNDS[case.dtype]:
            problems.append(f"at the end, {name}: error {wrong:.3g}, above {BOUNDS[case.dtype]:g}")
    return problems
