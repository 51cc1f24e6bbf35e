"""The subject of a check: a variant, its options, a shape, a dtype, and the tolerance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from moshi_ttt.core.block import BlockContext, SequenceBlock, Site, SiteInfo, SiteKind
from moshi_ttt.core.config import BlockConfig
from moshi_ttt.core.config_parsing import parse_block
from moshi_ttt.core.format import SequenceFormat
from moshi_ttt.core.precision import FP32_STATE, PrecisionPolicy
from moshi_ttt.core.registry import Registry, default_registry
from moshi_ttt.core.state import BlockState
from moshi_ttt.core.testing.toy_host import FRAME_RATE, ToyMLP

# Bit-equality is asked between calls of equal shapes. Between cuts and batch sizes a matrix product rounds differently;
# in a bfloat16 model that moves a projection by an ulp (2^-8), which the state then carries: hence its wide bound.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 3e-2}


def error(actual: Tensor, expected: Tensor) -> float:
    """max |a - b| / max(1, max |b|), in float64; nan anywhere gives nan, which is below no bound."""
    a, b = actual.detach().double(), expected.detach().double()
    if a.numel() == 0:
        return 0.0
    return float((a - b).abs().max() / b.abs().max().clamp(min=1.0))


def assert_close(actual: Tensor, expected: Tensor, tolerance: float, what: str) -> None:
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    assert actual.dtype == expected.dtype, f"{what}: {actual.dtype}, expected {expected.dtype}"
    measured = error(actual, expected)
    assert measured <= tolerance, f"{what}: error {measured:.3g} above {tolerance:g}"


def assert_equal(actual: Tensor, expected: Tensor, what: str) -> None:
    assert torch.equal(actual, expected), f"{what}: not bit-equal, error {error(actual, expected):.3g}"


def assert_states_close(actual: BlockState, expected: BlockState, tolerance: float, what: str) -> None:
    assert actual.keys() == expected.keys(), f"{what}: state names {sorted(actual)}, expected {sorted(expected)}"
    for name, tensor in expected.items():
        assert_close(actual[name], tensor, tolerance, f"{what}: state {name!r}")


@dataclass(frozen=True)
class Shape:
    """Width and heads of the host, rows of the batch."""

    dim: int = 16
    heads: int = 2
    batch: int = 3


@dataclass(frozen=True, kw_only=True)
class BlockCase:
    """One variant with one set of options, at one shape and host dtype.

    ``chunk`` is the length after which the block's fast weights change: the option of that name, or 4. With
    ``compiled_step`` the block streams by its compiled step.
    """

    variant: str
    config: BlockConfig
    shape: Shape = Shape()
    dtype: torch.dtype = torch.float32
    policy: PrecisionPolicy = FP32_STATE
    registry: Registry = field(default_factory=default_registry, repr=False)
    seed: int = 0
    compiled_step: bool = False

    def __str__(self) -> str:
        options = self.config.model_dump(exclude_defaults=True, exclude={"variant", "layers"})
        listed = "-".join(f"{key}={value}" for key, value in options.items())
        name = f"{self.variant}-{listed or 'defaults'}-d{self.shape.dim}h{self.shape.heads}-{str(self.dtype)[6:]}"
        return f"{name}-compiled" if self.compiled_step else name

    @property
    def chunk(self) -> int:
        return self.info("meta").tokens(getattr(self.config, "chunk", 4))

    @property
    def tolerance(self) -> float:
        return TOLERANCE[self.dtype]

    @property
    def causal(self) -> bool:
        return self.block(device="meta").causal

    def anywhere(self) -> BlockCase:
        """The same case without what was chosen for this machine: that need not serve tensors without values."""
        fields = type(self.config).model_fields
        machine = {name: fields[name].get_default() for name in self.config.machine_options}
        return self.at(config=self.config.model_copy(update=machine), compiled_step=False)

    def at(self, **changes: Any) -> BlockCase:
        """The same case with some fields changed."""
        return replace(self, **changes)

    @property
    def kind(self) -> SiteKind:
        return getattr(self.registry.block(self.variant).factory, "kind", SiteKind.SEQUENCE)

    def info(self, device: str = "cpu") -> SiteInfo:
        return SiteInfo(
            site=Site(0, self.kind),
            mlp=ToyMLP(self.shape.dim, self.dtype, device) if self.kind is SiteKind.FEED_FORWARD else None,
            dim=self.shape.dim,
            num_heads=self.shape.heads,
            device=torch.device(device),
            dtype=self.dtype,
            format=SequenceFormat(),
            frame_rate=FRAME_RATE,
        )

    def block(self, device: str = "cpu") -> SequenceBlock:
        """The block with generic parameters: initial values plus noise, so that no term is zero by chance."""
        factory = self.registry.block(self.variant).factory
        block = factory(self.config, self.info(device), self.policy.roles(self.dtype))
        if device != "meta":
            generator = torch.Generator().manual_seed(self.seed)
            block.reset_parameters(generator)
            with torch.no_grad():
                for parameter in block.parameters():
                    noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                    parameter.add_((0.2 * noise).to(parameter))
            if self.compiled_step:
                block.compile_step()
        return block

    def inputs(self, length: int, *, batch: int | None = None, seed: int = 1) -> Tensor:
        """Activations ``[B, T, D]`` in the host's dtype."""
        generator = torch.Generator().manual_seed(seed)
        shape = (self.shape.batch if batch is None else batch, length, self.shape.dim)
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(self.dtype)

    def context(self, x: Tensor, **more: Any) -> BlockContext:
        """A context for ``x``; input embeddings are always given (a function of the same tokens)."""
        return BlockContext(input_embeddings=x.flip(-1), **more)

    def call(
        self, block: SequenceBlock, x: Tensor, state: BlockState | None = None, **more: Any
    ) -> tuple[Tensor, BlockState]:
        y, after = block(x, state, self.context(x, **more))
        return y, after

    def step(self, block: SequenceBlock, x: Tensor, state: BlockState, **more: Any) -> Tensor:
        return block.step(x, state, self.context(x, **more))

    def stream(self, block: SequenceBlock, pieces: Sequence[Tensor]) -> tuple[Tensor, BlockState]:
        """Outputs ``[B, T, D]`` and the final state of a stream from its beginning, in ``pieces [B, any, D]``."""
        state = block.allocate_state(len(pieces[0]))
        return torch.cat([self.step(block, piece, state) for piece in pieces], dim=1), state


def default_cases(
    variant: str,
    configs: Sequence[Mapping[str, Any]],
    registry: Registry | None = None,
    shapes: Sequence[Shape] | None = None,
    compiled_step: bool = False,
) -> tuple[BlockCase, ...]:
    """Every option set in float64, float32 and bfloat16, over two shapes."""
    registry = registry or default_registry()
    shapes = shapes or (Shape(), Shape(dim=24, heads=3, batch=2))
    cases = []
    for options in configs:
        config = parse_block({"variant": variant, **options}, registry=registry)
        for index, dtype in enumerate((torch.float64, torch.float32, torch.bfloat16)):
            shape = shapes[index % len(shapes)]
            case = BlockCase(variant=variant, config=config, shape=shape, dtype=dtype, registry=registry)
            cases.append(case.at(compiled_step=compiled_step))
    return tuple(cases)
