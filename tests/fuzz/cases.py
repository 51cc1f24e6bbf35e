"""Random blocks and random programs of streams, and what the oracle says of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from moshi_ttt.core.block import SequenceBlock
from moshi_ttt.core.config_parsing import parse_block
from moshi_ttt.core.registry import default_registry
from moshi_ttt.core.testing import BlockCase, Shape
from tests.fuzz import oracle

BAD = {"nan": torch.nan, "inf": torch.inf, "huge": 1e300}


@dataclass(frozen=True)
class Drawn:
    """A block: variant and options, a shape, and the seed of its parameters."""

    variant: str
    options: dict[str, Any]
    heads: int
    width: int
    batch: int
    seed: int

    @property
    def case(self) -> BlockCase:
        config = parse_block({"variant": self.variant, **self.options}, registry=default_registry())
        shape = Shape(dim=self.heads * self.width, heads=self.heads, batch=self.batch)
        return BlockCase(variant=self.variant, config=config, shape=shape, dtype=torch.float64, seed=self.seed)

    def block(self) -> SequenceBlock:
        """With parameters far from their initial values, token scales below zero among them."""
        block = self.case.block()
        generator = torch.Generator().manual_seed(self.seed + 1)
        with torch.no_grad():
            for name, parameter in block.named_parameters():
                size = {"token_scale_offset": 0.5, "projection": 0.5, "conv": 0.5}.get(name, 0.1)
                parameter.add_(size * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
        return block


def _hybrid_options() -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries(
        {
            "chunk": st.integers(1, 6), "base_lr": st.sampled_from([0.05, 0.5, 2.0]),
            "rope_theta": st.sampled_from([10_000.0, 50.0]), "norm_eps": st.sampled_from([1e-6, 1e-3]),
            "target_eps": st.sampled_from([1e-8, 1e-3]), "post_norm_eps": st.sampled_from([1e-6, 1e-2]),
            "gate": st.fixed_dictionaries(
                {"init": st.sampled_from([0.05, 0.5]), "alpha": st.sampled_from(["channel", "layer", "fixed"])}
            ),
        },
        optional={"checkpoint_chunks": st.integers(1, 3)},
    )  # fmt: skip


def _depth(variant: str) -> st.SearchStrategy[dict[str, Any]]:
    if variant == "ttt_linear":
        return st.just({})
    if variant == "ttt_mlp":
        return st.fixed_dictionaries({"expansion": st.integers(1, 3)})
    by_depth = st.fixed_dictionaries({"depth": st.integers(1, 4), "expansion": st.integers(1, 2)})
    return by_depth | st.fixed_dictionaries({"hidden_dims": st.lists(st.integers(2, 9), min_size=1, max_size=3)})


def _in_place_options() -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries(
        {
            "chunk": st.integers(1, 7), "lr": st.sampled_from([0.02, 0.3]), "learned_lr": st.booleans(),
            "target": st.sampled_from(["input_embed", "hidden_states"]), "conv_kernel": st.integers(1, 8),
            "padding": st.sampled_from(["centered", "causal"]), "decay": st.sampled_from([0.0, 0.1, 0.6]),
            "clip": st.sampled_from([None, 5.0, 0.2]), "train_w_down": st.booleans(),
        }
    )  # fmt: skip


@st.composite
def blocks(draw: st.DrawFn, *, causal: bool = False) -> Drawn:
    """Any variant with any options; ``causal`` leaves out those that see the future."""
    variant = draw(st.sampled_from(["ttt_linear", "ttt_mlp", "ttt_multilayer", "gating_mlp"]))
    if variant == "gating_mlp":
        options = draw(_in_place_options())
    else:
        options = draw(_hybrid_options()) | draw(_depth(variant))
        if not causal:
            options |= draw(st.sampled_from([{}, {}, {"causal": False}, {"bidirectional": True}]))
    return Drawn(
        variant, options, heads=draw(st.integers(1, 3)), width=draw(st.sampled_from([4, 6, 8])),
        batch=draw(st.integers(1, 3)), seed=draw(st.integers(0, 2**20)),
    )  # fmt: skip


# ---- the oracle's side


def leaves(block: SequenceBlock) -> dict[str, Tensor]:
    """The block's parameters, and gates that are not trained, as the oracle's own leaves."""
    named = dict(block.named_parameters()) | {name: each for name, each in block.named_buffers() if "gate" in name}
    return {name: tensor.detach().double().clone().requires_grad_() for name, tensor in named.items()}


def stream_of(block: SequenceBlock, parameters: oracle.Parameters) -> oracle.Hybrid | oracle.InPlace:
    """One stream of the oracle, as this block would compute it."""
    config: Any = block.config
    if config.variant != "gating_mlp":
        return oracle.Hybrid(parameters, hybrid_options(block))
    left = config.conv_kernel - 1 if config.padding == "causal" else (config.conv_kernel - 1) // 2
    options = oracle.InPlaceOptions(
        config.chunk, config.lr, left, config.target == "input_embed", config.decay, config.clip
    )
    mlp: Any = block.info.mlp
    return oracle.InPlace(parameters, options, mlp.linear_in.weight.detach(), mlp.linear_out.weight.detach())


def hybrid_options(block: SequenceBlock) -> oracle.HybridOptions:
    config: Any = block.config
    return oracle.HybridOptions(
        block.info.num_heads, config.chunk, config.base_lr, config.causal, config.rope_theta, config.norm_eps,
        config.target_eps, config.post_norm_eps,
    )  # fmt: skip


def memory_of(block: Any, state: dict[str, Tensor], row: int) -> dict[str, Tensor]:
    """The fast weights of one row of a block's state, as the oracle names them."""
    if block.config.variant == "gating_mlp":
        return {"accumulated": block.accumulated_update(state)[row]}
    return {name: tensor[row] for name, tensor in state.items() if name.startswith(("weight.", "bias."))}


# ---- programs of streams


@dataclass(frozen=True)
class Operation:
    """One thing that happens to B streams.

    Attributes:
        kind: ``step`` (tokens into a state in place), ``call`` (tokens, a new state), ``reset``, ``save`` (to a file
            and back), ``copy`` (another block goes on).
        tokens: how many.
        runs, updates, rows: a bool for each row: whether it takes part, whether it updates, whether it is reset.
        bad: row, place and kind of a token that is not finite.
    """

    kind: str
    tokens: int = 1
    runs: tuple[bool, ...] | None = None
    updates: tuple[bool, ...] | None = None
    rows: tuple[bool, ...] | None = None
    bad: tuple[int, int, str] | None = None


@dataclass(frozen=True)
class Program:
    """Operations on the streams of one block."""

    block: Drawn
    operations: list[Operation] = field(default_factory=list)


@st.composite
def programs(draw: st.DrawFn) -> Program:
    block = draw(blocks(causal=True))
    rows = st.tuples(*[st.booleans()] * block.batch)
    operations = []
    for _ in range(draw(st.integers(1, 10))):
        kind = draw(st.sampled_from(["step", "step", "step", "call", "call", "reset", "save", "copy"]))
        tokens = draw(st.integers(1, 9)) if kind == "call" else draw(st.sampled_from([1, 1, 1, 1, 3]))
        bad = None
        if kind in ("step", "call") and draw(st.integers(0, 7)) == 7:
            row, place = draw(st.integers(0, block.batch - 1)), draw(st.integers(0, tokens - 1))
            bad = row, place, draw(st.sampled_from(sorted(BAD)))
        operations.append(
            Operation(
                kind, tokens, runs=draw(st.none() | rows), updates=draw(st.none() | rows),
                rows=draw(st.none() | rows), bad=bad,
            )
        )  # fmt: skip
    return Program(block, operations)
