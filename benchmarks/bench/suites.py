"""The comparisons, by suite. Each suite reuses the benchmark of its subject, and that benchmark's gate."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import gating_mlp
import gating_mlp_streaming
import in_place_updates
import inner_loop
import ridge
import ridge_widths
import torch
import training as whole_training  # noqa: TID251 - benchmarks/training.py, from the folder of run.py
from torch import Tensor, nn

from bench.measure import Call, Comparison, Gate
from moshi_ttt.core.block import BlockContext, SequenceBlock
from moshi_ttt.core.state import clone
from moshi_ttt.plugins.hybrid.compiled import compiled_inner_loop
from moshi_ttt.plugins.hybrid.inner_loop import initial_state
from moshi_ttt.plugins.hybrid.recurrent import recurrent_inner_loop
from moshi_ttt.training.runtime import start

EXACT = 1e-10
"""Errors of a float64 form against the definition are below this."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """The sizes of the problems.

    Attributes:
        heads, width: H and D of inner loops.
        tokens, chunk: T and C of training.
        rows: B of streams, the smaller first.
        dim, hidden: of blocks and of the MLP beside them.
        scaling: axis -> its values, the first of which is the reference.
        model_dim, layers, frames: of the whole model that is trained.
    """

    heads: int
    width: int
    tokens: int
    chunk: int
    rows: tuple[int, int]
    dim: int
    hidden: int
    scaling: Mapping[str, tuple[int, ...]]
    model_dim: int
    layers: int
    frames: int


SIZES = {
    "small": Size(
        heads=8, width=64, tokens=256, chunk=16, rows=(1, 8), dim=512, hidden=1408,
        scaling={"T": (256, 512, 1024, 2048), "B": (1, 2, 4, 8), "C": (16, 32, 64), "heads": (8, 16, 32)},
        model_dim=128, layers=4, frames=300,
    ),
    "smoke": Size(
        heads=2, width=8, tokens=16, chunk=4, rows=(1, 2), dim=16, hidden=24,
        scaling={"T": (8, 16), "B": (1, 2), "C": (4, 8), "heads": (2, 4)},
        model_dim=64, layers=2, frames=140,
    ),
}  # fmt: skip


Opened = tuple[list[Gate], Callable[[], list[Comparison]]]
"""The results of a suite's gates, and what builds its comparisons once they have passed."""
Suite = Callable[[Size], AbstractContextManager[Opened]]
"""One subject, while it is measured."""


def suite(gates: Callable[[], list[Gate]], comparisons: Callable[[Size], list[Comparison]]) -> Suite:
    """A suite that has to close nothing."""

    @contextmanager
    def opened(size: Size) -> Iterator[Opened]:
        yield gates(), lambda: comparisons(size)

    return opened


# ---- the inner loop


def inner_loop_gates() -> list[Gate]:
    return [
        Gate(name=f"inner loop, {kind}: every form and its gradients, by token and streamed, against the definition",
             error=inner_loop.gate(kind), tolerance=EXACT)
        for kind in ("linear", "mlp")
    ]  # fmt: skip


def inner_loop_comparisons(size: Size) -> list[Comparison]:
    found = []
    for kind in ("linear", "mlp"):
        made = (kind, 1, size.heads, size.tokens, size.chunk, size.width)
        forms = {label: training(*made, form=form) for label, form in TRAINED.items()}
        found.append(Comparison(name=f"inner loop, training, {kind}", forms=forms, reference="autograd"))
        for rows in size.rows:
            found += steps(kind, rows, size)
    return found


TRAINED = {"written out": "torch", "C++": "cpp", "autograd": "autograd"}
"""The label of each form of training -> its name in ``inner_loop.TRAIN_FORMS``."""


def training(kind: str, batch: int, heads: int, tokens: int, chunk: int, width: int, *, form: str = "torch") -> Call:
    """Forward and backward of one form."""
    problem = inner_loop.Problem(kind, batch, heads, tokens, chunk, width, torch.float32)
    leaves, chosen = problem.leaves(), inner_loop.TRAIN_FORMS[form]
    return lambda: torch.autograd.grad(problem.run(*chosen).square().mean(), leaves)


def streamed(kind: str, rows: int, heads: int, chunk: int, width: int, form: Callable[..., Tensor]) -> Call:
    """A whole chunk of streamed steps, so that its border is among them."""
    problem = inner_loop.Problem(kind, rows, heads, 1, chunk, width, torch.float32)
    state = clone(initial_state(problem.weights, problem.biases, chunk, rows))

    @torch.no_grad()
    def call() -> None:
        for _ in range(chunk):
            form(problem.tokens, state, problem.norm, problem.scale)

    return call


def steps(kind: str, rows: int, size: Size) -> list[Comparison]:
    """The compiled step beside the step, and the step beside one read of each row's fast weights."""
    made = (kind, rows, size.heads, size.chunk, size.width)
    problem = inner_loop.Problem(kind, rows, size.heads, 1, size.chunk, size.width, torch.float32)
    state = clone(initial_state(problem.weights, problem.biases, size.chunk, rows))
    weights = [each for name, each in state.items() if name.startswith("weight")]
    vectors = [torch.randn(rows * size.heads, 1, weight.shape[2]) for weight in weights]

    @torch.no_grad()
    def reads() -> None:
        for _ in range(size.chunk):
            for x, weight in zip(vectors, weights, strict=True):
                torch.bmm(x, weight.flatten(0, 1))

    step, compiled = (streamed(*made, form) for form in (recurrent_inner_loop, compiled_inner_loop))
    name = f"inner loop, streaming, {kind}, B {rows}"
    return [
        Comparison(name=name, forms={"step": step, "compiled step": compiled}, reference="step"),
        Comparison(name=f"{name}, reads", forms={"one read": reads, "step": step}, reference="one read"),
    ]


# ---- in-place TTT


def in_place_gates() -> list[Gate]:
    gates = [Gate(name="in-place TTT: the block against the definition", error=gating_mlp.gate(), tolerance=EXACT)]
    with torch.no_grad():
        for compiled in (False, True):
            form = "compiled" if compiled else "streamed"
            error = gating_mlp_streaming.gate("cpp" if compiled else "torch")
            gates.append(Gate(name=f"in-place TTT: {form} against the definition", error=error, tolerance=EXACT))
            gates += [
                Gate(name=f"in-place TTT, {name}: {form} against one call",
                     error=in_place_updates.gate(options, compiled=compiled), tolerance=EXACT)
                for name, options in in_place_updates.UPDATES.items()
            ]  # fmt: skip
    return gates


def in_place_comparisons(size: Size) -> list[Comparison]:
    torch.manual_seed(0)
    mlp = gating_mlp.PlainMLP(size.dim, size.hidden, torch.float32)
    blocks = {name: in_place_updates.build(mlp, options) for name, options in in_place_updates.UPDATES.items()}
    forms = {"plain MLP": trained(mlp, size), **{name: trained_block(block, size) for name, block in blocks.items()}}
    found = [Comparison(name="in-place TTT, training", forms=forms, reference="plain MLP")]
    for rows in size.rows:
        x = torch.randn(rows, 1, size.dim)
        stepped = {"plain MLP": without_graph(lambda x=x: mlp(x))}
        for name, options in in_place_updates.UPDATES.items():
            for compiled in (False, True):
                block = in_place_updates.build(mlp, options, compiled=compiled)
                stepped[f"{name}, compiled" if compiled else name] = step_of(block, rows)
        found.append(Comparison(name=f"in-place TTT, streaming, B {rows}", forms=stepped, reference="plain MLP"))
    return found


def trained(module: nn.Module, size: Size) -> Call:
    x = torch.randn(1, size.tokens, size.dim, requires_grad=True)
    return lambda: torch.autograd.grad(module(x).square().mean(), [x, *module.parameters()])


def trained_block(block: SequenceBlock, size: Size) -> Call:
    """Forward and backward of a block, with gradients of its input and its parameters."""
    x = torch.randn(1, size.tokens, size.dim, requires_grad=True)
    context = BlockContext(input_embeddings=x.detach(), want_state=False)
    leaves = [x, *(each for each in block.parameters() if each.requires_grad)]
    return lambda: torch.autograd.grad(block(x, None, context)[0].square().mean(), leaves, allow_unused=True)


def without_graph(call: Callable[[], object]) -> Call:
    def run() -> None:
        with torch.no_grad():
            call()

    return run


def step_of(block: SequenceBlock, rows: int) -> Call:
    state = block.allocate_state(rows)
    x = torch.randn(rows, 1, block.info.dim)
    context = BlockContext(input_embeddings=x)
    return without_graph(lambda: block.step(x, state, context))


# ---- blocks beside an MLP of the host's width

BLOCKS: dict[str, dict[str, Any]] = {
    "ttt_linear": {"variant": "ttt_linear", "chunk": 16},
    "ttt_mlp": {"variant": "ttt_mlp", "chunk": 16},
    "ttt_ridge": {"variant": "ttt_ridge", "chunk": 16, "backend": {"step": "torch"}},
}


def block_gates() -> list[Gate]:
    name = "ttt_ridge: a call and a stream, by tensor operations and in C++, against the definition"
    return [Gate(name=name, error=ridge.gate(), tolerance=EXACT)]


def block_comparisons(size: Size) -> list[Comparison]:
    torch.manual_seed(0)
    mlp = gating_mlp.PlainMLP(size.dim, size.hidden, torch.float32)
    made = {name: ridge.block_of(entry, size.dim, size.heads, "cpu", torch.float32) for name, entry in BLOCKS.items()}
    forms = {"plain MLP": trained(mlp, size), **{name: trained_block(block, size) for name, block in made.items()}}
    found = [Comparison(name="blocks, training", forms=forms, reference="plain MLP")]
    x = torch.randn(1, 1, size.dim)
    stepped = {"plain MLP": without_graph(lambda: mlp(x)), **{name: step_of(block, 1) for name, block in made.items()}}
    found.append(Comparison(name="blocks, streaming, B 1", forms=stepped, reference="plain MLP"))
    for rows in size.rows:
        forms = {
            label: step_of(ridge_of(size.dim, size.heads, backend), rows)
            for label, backend in (("step", "torch"), ("compiled step", "cpp"))
        }
        found.append(Comparison(name=f"ttt_ridge, streaming, B {rows}", forms=forms, reference="step"))
    cases = {name: options for name, options in ridge_widths.CASES.items() if "2048" not in name}
    for label, backend in (("keys", "torch"), ("keys, compiled", "cpp")):
        forms = {name: step_of(ridge_of(size.dim, 1, backend, **options), 1) for name, options in cases.items()}
        found.append(Comparison(name=f"ttt_ridge, streaming, {label}", forms=forms, reference="keys of 128"))
    return found


def ridge_of(dim: int, heads: int, backend: str, **options: Any) -> SequenceBlock:
    """The least-squares memory that streams by a backend."""
    entry = {**BLOCKS["ttt_ridge"], "heads": heads, "backend": backend, **options}
    return ridge.block_of(entry, dim, heads, "cpu", torch.float32)


# ---- scaling of the hybrid layer's inner loop


def scaling_comparisons(size: Size) -> list[Comparison]:
    """Training over T, B, C and heads; a chunk of streamed steps over B, C and heads (a step does not know T)."""
    found = []
    start = {"T": size.scaling["T"][0], "B": 1, "C": size.chunk, "heads": size.heads}
    for axis, values in size.scaling.items():
        shapes = {f"{axis} {value}": {**start, axis: value} for value in values}
        sizes = {label: shape[axis] for label, shape in shapes.items()}
        reference = next(iter(shapes))
        for kind in ("linear", "mlp"):
            forms = {
                label: training(kind, shape["B"], shape["heads"], shape["T"], shape["C"], size.width)
                for label, shape in shapes.items()
            }
            name = f"scaling, training, {kind}, over {axis}"
            found.append(Comparison(name=name, forms=forms, reference=reference, axis=sizes))
            if axis == "T":
                continue
            forms = {
                label: streamed(kind, shape["B"], shape["heads"], shape["C"], size.width, recurrent_inner_loop)
                for label, shape in shapes.items()
            }
            name = f"scaling, a chunk of steps, {kind}, over {axis}"
            found.append(Comparison(name=name, forms=forms, reference=reference, axis=sizes))
    return found


# ---- a training step of a whole model


@contextmanager
def whole_model(size: Size) -> Iterator[Opened]:
    """An optimizer step with LoRA, and the same with one block in the last layer."""
    with start("cpu", None) as runtime:
        made = {
            name: whole_training.trainer(entry, False, runtime, dim=size.model_dim, layers=size.layers)
            for name, entry in whole_training.CASES.items()
        }
        given = whole_training.batch(size.frames)
        losses = {name: each.make_step([given]).losses.total for name, each in made.items()}
        error = max(abs(loss - losses["LoRA"]) for loss in losses.values())
        gate = Gate(name="model: the first loss of every case, with closed gates", error=error, tolerance=1e-30)

        def comparisons() -> list[Comparison]:
            for each in made.values():
                whole_training.open_gates(each)
            forms = {name: lambda each=each: each.make_step([given]) for name, each in made.items()}
            return [Comparison(name="model, training step", forms=forms, reference="LoRA")]

        yield [gate], comparisons


SUITES: Mapping[str, Suite] = {
    "inner-loop": suite(inner_loop_gates, inner_loop_comparisons),
    "in-place": suite(in_place_gates, in_place_comparisons),
    "blocks": suite(lambda: [*block_gates(), *inner_loop_gates()], block_comparisons),
    "scaling": suite(inner_loop_gates, scaling_comparisons),
    "model": whole_model,
}
