"""Injection: put planned blocks into a model, and take them out again.

``planning`` finds all conflicts before the model is touched, and an application that fails half-way leaves the model
as it was.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, overload

from torch import Tensor, nn

from moshi_ttt.core import summary
from moshi_ttt.core.block import SequenceBlock, Site
from moshi_ttt.core.config import DEFAULT_PRECISION, BlockConfig, TTTConfig
from moshi_ttt.core.deprecation import moved_names, renamed
from moshi_ttt.core.errors import ConfigError, InjectionError, MoshiTTTError
from moshi_ttt.core.host import HostModel
from moshi_ttt.core.host_lookup import host_of
from moshi_ttt.core.initial_values import fill_blocks, initialize_blocks, reset_unsaved
from moshi_ttt.core.planning import PlannedBlock, plan_blocks
from moshi_ttt.core.precision import PrecisionPolicy
from moshi_ttt.core.registry import Registry, default_registry

__getattr__ = moved_names(__name__, __name__, {"initialise_blocks": "initialize_blocks"})

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["Injection", "Plan", "PlannedBlock", "inject", "make_plan"]

logger = logging.getLogger("moshi_ttt.injection")


@dataclass(frozen=True, kw_only=True, repr=False)
class Plan:
    """Resolved (site, variant, config) triples for one model, in layer order. Nothing has been touched yet."""

    host: HostModel
    policy: PrecisionPolicy
    seed: int
    blocks: tuple[PlannedBlock, ...]

    def __repr__(self) -> str:
        return f"<Plan: {summary.describe(self)}>"

    @property
    def parameters(self) -> int:
        """Parameters that applying the plan adds."""
        return sum(block.parameters for block in self.blocks)

    @property
    def state_bytes(self) -> int:
        """Bytes of state that one stream will occupy."""
        return sum(block.state_bytes for block in self.blocks)

    @property
    def cast_bytes(self) -> int:
        """Bytes that a stream, of any number of rows, keeps of parameters in the dtype of products."""
        return sum(block.cast_bytes for block in self.blocks)

    def apply(self, model: nn.Module, values: Mapping[str, Tensor] | None = None) -> Injection:
        """Build, initialize and attach all blocks. Raises a MoshiTTTError and leaves the model untouched on failure.

        On a meta-device model the blocks are on meta too; call ``Injection.initialize`` once they are materialized.

        Args:
            model: what the plan was made for.
            values: of every parameter and persistent buffer of every block, in its shape and dtype, by the names of
                ``Injection.named_parameters`` and ``named_buffers``; no initial value is drawn for them then.
        """
        if self.host.blocks(model):
            raise InjectionError("Nothing was injected: the model already has blocks; remove them first.")
        try:
            built = {planned.site: planned.build() for planned in self.blocks}
            if values is not None:
                fill_blocks(built, self.seed, values)
            elif not any(parameter.is_meta for block in built.values() for parameter in block.parameters()):
                initialize_blocks(built, self.seed)
            for block in built.values():
                block.check_precision("build")
            self.host.attach(model, built)
        except MoshiTTTError:
            raise
        except Exception as error:  # a third party's block can fail in any way
            raise InjectionError(
                f"Nothing was injected: building the blocks failed with {type(error).__name__}: {error}."
            ) from error
        for planned in self.blocks:
            logger.info("%s", _describe(planned, built[planned.site]))
        return Injection(model=model, plan=self)


def _describe(planned: PlannedBlock, block: SequenceBlock) -> str:
    """One log line: layer, variant, parameters, shapes, dtype, device."""
    shapes = " ".join(f"{name}{list(parameter.shape)}" for name, parameter in block.named_parameters())
    return (
        f"{planned.site}: {planned.variant.name} of {planned.variant.provenance}, {planned.parameters:,} parameters, "
        f"{planned.roles.master} on {planned.info.device}: {shapes}"
    )


@dataclass(frozen=True, repr=False)
class Injection:
    """Blocks in a model, and the plan they came from.

    It stands for the blocks that were in the model when it was made. When they are no longer there (removed, or others
    injected since), everything it does is refused with InjectionError, and touches nothing.
    """

    model: nn.Module
    plan: Plan
    _made: dict[Site, SequenceBlock] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_made", self.host.blocks(self.model))

    def __repr__(self) -> str:
        return f"<Injection: {summary.describe(self.plan)}>"

    @property
    def host(self) -> HostModel:
        return self.plan.host

    @property
    def blocks(self) -> dict[Site, SequenceBlock]:
        """The attached blocks by site. Raises InjectionError where they are no longer those of this injection."""
        here = self.host.blocks(self.model)
        if here.keys() != self._made.keys() or any(here[site] is not block for site, block in self._made.items()):
            raise InjectionError(
                f"This injection made blocks at {_listed(self._made)}, and they are no longer in its model: "
                + (
                    f"those at {_listed(here)} are of another injection. Use the injection that made them"
                    if here
                    else "they were removed. Inject again"
                )
                + ", and drop this one. Nothing was changed."
            )
        return here

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The declared trainable set: ``layers.3.sequence.NAME`` and parameter, in layer order."""
        for site, block in self.blocks.items():
            for name, parameter in block.named_parameters():
                yield f"{site}.{name}", parameter

    def parameters(self) -> Iterator[nn.Parameter]:
        """The blocks' parameters: what an optimizer for training the blocks alone gets."""
        for _, parameter in self.named_parameters():
            yield parameter

    def named_buffers(self) -> Iterator[tuple[str, Tensor]]:
        """The blocks' persistent buffers: ``layers.3.sequence.NAME`` and buffer. Raises as ``persistent_buffers``."""
        for site, block in self.blocks.items():
            for name, buffer in block.persistent_buffers().items():
                yield f"{site}.{name}", buffer

    def print_summary(self, console: Console | None = None) -> None:
        """Print a table: site, variant, parameters, state per stream, and chunk in tokens and seconds, of each block.

        Args:
            console: where to; standard output by default.
        """
        from rich.console import Console

        own = {id(parameter) for parameter in self.parameters()}
        base = sum(parameter.numel() for parameter in self.model.parameters() if id(parameter) not in own)
        (console or Console()).print(summary.table(self.plan, base))

    def freeze_base(self) -> None:
        """Make the blocks' parameters the only ones that require gradients."""
        own = {id(parameter) for parameter in self.parameters()}
        for parameter in self.model.parameters():
            parameter.requires_grad_(id(parameter) in own)

    def set_inner_lr_factor(self, factor: float) -> None:
        """Multiply every block's inner learning rate by ``factor`` from now on: a schedule's value at this step.

        Not saved: a schedule ends at 1, and an adapter is saved there. To disable updates, use ``host.updates``.

        Raises:
            ValueError: not above 0: 0 would disable updates, which ``host.updates`` does.
            InjectionError: not 1, and a block does not scale its inner learning rate.
        """
        if not 0 < factor < float("inf"):
            raise ValueError(
                f"An inner learning rate's factor is a number above 0, got {factor}. To disable updates, use "
                "host.updates(model, False)."
            )
        if factor != 1:
            self.check_scales_inner_lr()
        for block in self.blocks.values():
            block.inner_lr_factor = float(factor)

    def check_scales_inner_lr(self) -> None:
        """Raise InjectionError where a block does not declare that it scales its inner learning rate."""
        deaf = [f"{site} ({type(block).__name__})" for site, block in self.blocks.items() if not block.scales_inner_lr]
        if deaf:
            raise InjectionError(
                f"A schedule of the inner learning rate would have no effect on {', '.join(deaf)}: the block does not "
                "declare scales_inner_lr. Leave inner_lr_warmup out, or have the block multiply its inner learning "
                "rate by self.inner_lr_factor and declare scales_inner_lr = True."
            )

    def initialize(self, *, saved: bool = True) -> None:
        """Give every block its initial values (again): after ``to_empty`` on a model built on the meta device.

        ``saved=False`` leaves out parameters and persistent buffers, which an adapter or a checkpoint is to fill next:
        nothing is drawn for them.
        """
        if saved:
            initialize_blocks(self.blocks, self.plan.seed)
        else:
            reset_unsaved(self.blocks, self.plan.seed)

    def initialise(self, *, saved: bool = True) -> None:
        """The earlier name of ``initialize``."""
        renamed("initialise", "initialize", of=Injection)
        self.initialize(saved=saved)

    def check_precision(self, when: str) -> None:
        """Every block's parameters have the policy's dtypes, or PrecisionError names the tensor."""
        for block in self.blocks.values():
            block.check_precision(when)

    def remove(self) -> None:
        """Take the blocks out; the model gives bit-identical outputs to the base again.

        Raises InjectionError where they are out already, and HostError where the host cannot let them go now (while it
        streams). The model is then as it was.
        """
        if self.blocks:
            self.host.detach(self.model)


def _listed(blocks: Mapping[Site, SequenceBlock]) -> str:
    return ", ".join(map(str, sorted(blocks))) or "no site"


def make_plan(
    model: nn.Module,
    host: HostModel,
    entries: Sequence[BlockConfig],
    *,
    policy: PrecisionPolicy,
    registry: Registry | None = None,
    seed: int = 0,
) -> Plan:
    """Resolve config entries against a model.

    Raises:
        InjectionError: with every conflict found: layers that do not exist or are claimed twice, a host without such
            sites, a non-causal block in a causal host, options that do not fit the host, blocks already present.
    """
    registry = registry or default_registry()
    blocks = plan_blocks(model, host, entries, policy=policy, registry=registry)
    return Plan(host=host, policy=policy, seed=seed, blocks=blocks)


@overload
def inject(model: nn.Module, config: TTTConfig, /, *, registry: Registry | None = None) -> Injection: ...


@overload
def inject(
    model: nn.Module,
    /,
    *blocks: BlockConfig,
    host: str | None = None,
    precision: str | None = None,
    seed: int | None = None,
    registry: Registry | None = None,
) -> Injection: ...


def inject(
    model: nn.Module,
    /,
    *configs: TTTConfig | BlockConfig,
    host: str | None = None,
    precision: str | None = None,
    seed: int | None = None,
    registry: Registry | None = None,
) -> Injection:
    """Put blocks into a model: plan, check everything, attach.

    Args:
        model: the base model.
        configs: one configuration for each variant and set of layers, such as ``TTTMLPConfig(layers="last:3")``; or one
            whole ``TTTConfig``, which says the rest as well.
        host: the registered name of the model's host; None finds the one that recognizes the model.
        precision: the registered name of a precision policy; None is ``fp32_state``.
        seed: of the blocks' initial values; None is 0.
        registry: where names are looked up; the process's registry by default.

    Raises:
        ConfigError: no configuration, a ``TTTConfig`` beside something that it says itself, or an unknown name.
        HostError: no host recognizes the model, or several do.
        InjectionError: as ``make_plan`` and ``Plan.apply``; the model is untouched.
    """
    registry = registry or default_registry()
    entries = [config for config in configs if isinstance(config, BlockConfig)]
    whole = [config for config in configs if isinstance(config, TTTConfig)]
    if len(entries) + len(whole) != len(configs) or len(whole) > 1 or bool(whole) == bool(entries):
        given = ", ".join(_kind(config) for config in configs) or "none"
        raise ConfigError(
            f"inject takes block configurations, such as TTTMLPConfig(layers='last:3'), or one TTTConfig (load_config "
            f"reads one from a file); got {given}."
        )
    if whole:
        if any(argument is not None for argument in (host, precision, seed)):
            raise ConfigError("A TTTConfig says host, precision and seed itself: leave those arguments out.")
        config, entries = whole[0], list(whole[0].ttt)
        host_adapter, precision, seed = registry.host(config.host.qualified_name), config.precision, config.seed
    else:
        host_adapter = host_of(model, registry=registry) if host is None else registry.host(host)
    policy = registry.policy(DEFAULT_PRECISION if precision is None else precision)
    plan = make_plan(model, host_adapter, entries, policy=policy, registry=registry, seed=seed or 0)
    return plan.apply(model)


def _kind(given: object) -> str:
    return f"the class {given.__name__}" if isinstance(given, type) else type(given).__name__
