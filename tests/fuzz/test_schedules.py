"""Random programs of streams against the oracle, row by row: steps, calls, masks, resets, files, copies, bad tokens."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path

import torch
from hypothesis import given, settings
from safetensors.torch import load_file, save_file
from torch import Tensor

from moshi_ttt.core import state as states
from moshi_ttt.core.block import SequenceBlock
from moshi_ttt.core.testing import error
from tests.fuzz.cases import BAD, Operation, Program, leaves, memory_of, programs, stream_of

TOLERANCE = 1e-10


class Streams:
    """B streams of a block, and beside each the oracle's own."""

    def __init__(self, program: Program) -> None:
        self.case, self.block = program.block.case, program.block.block()
        self.parameters = leaves(self.block)
        self.rows = [stream_of(self.block, self.parameters) for _ in range(program.block.batch)]
        self.state = self.block.allocate_state(program.block.batch)
        self.generator = torch.Generator().manual_seed(program.block.seed)

    def run(self, operation: Operation, number: int) -> None:
        what = f"operation {number}, {operation}"
        if operation.kind in ("step", "call"):
            self._tokens(operation, what)
        elif operation.kind == "reset":
            rows = operation.rows or (True,) * len(self.rows)
            self.block.reset_state(self.state, torch.tensor(rows))
            for row, reset in enumerate(rows):
                if reset:
                    self.rows[row] = stream_of(self.block, self.parameters)
        elif operation.kind == "save":
            with tempfile.TemporaryDirectory() as folder:
                save_file(self.state, Path(folder, "state.safetensors"))
                states.copy_(self.state, load_file(Path(folder, "state.safetensors")))
        else:
            self.block = copy.deepcopy(self.block)
        for row, stream in enumerate(self.rows):
            for name, expected in stream.memory().items():
                measured = error(memory_of(self.block, self.state, row)[name], expected)
                assert measured < TOLERANCE, f"{what}: {name} of row {row} is off by {measured:.3g}"

    def _tokens(self, operation: Operation, what: str) -> None:
        shape = (len(self.rows), operation.tokens, self.case.shape.dim)
        x = torch.randn(shape, generator=self.generator, dtype=torch.float64)
        if operation.bad is not None:
            row, place, kind = operation.bad
            x[row, place] = BAD[kind]
        masks = {"exec_mask": operation.runs, "updates": operation.updates}
        if operation.kind == "call":
            masks["reset"] = operation.rows
        given = {name: torch.tensor(mask) for name, mask in masks.items() if mask is not None}
        y = self._through(self.block, operation.kind, x, given)
        for row, tokens in enumerate(x):
            if "reset" in given and given["reset"][row]:
                self.rows[row] = stream_of(self.block, self.parameters)
            if operation.runs is not None and not operation.runs[row]:
                continue
            updates = operation.updates is None or operation.updates[row]
            for place, token in enumerate(tokens):
                expected = self.rows[row].token(token, token.flip(-1), updates)
                if expected.isfinite().all() and token.abs().max() < 1e70:
                    measured = error(y[row, place], expected)
                    assert measured < TOLERANCE, f"{what}: token {place} of row {row} is off by {measured:.3g}"

    def _through(self, block: SequenceBlock, kind: str, x: Tensor, given: dict[str, Tensor]) -> Tensor:
        with torch.no_grad():
            context = self.case.context(x, **given)
            if kind == "step":
                return block.step(x, self.state, context)
            y, after = block(x, states.clone(self.state), context)
            states.copy_(self.state, after)
            return y


@settings(max_examples=settings.default.max_examples * 2 // 5)
@given(program=programs())
def test_streams_compute_the_definition_whatever_happens_to_them(program: Program) -> None:
    streams = Streams(program)
    for number, operation in enumerate(program.operations):
        streams.run(operation, number)
