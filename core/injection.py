"""Injection: plan, validate, apply, remove.

All conflicts are found before the model is touched: a plan that cannot be carried out raises one error that lists
every problem, and an application that fails half-way leaves the model as it was.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor, nn

from moshi_ttt.core import summary
from moshi_ttt.core.block import SequenceBlock, Site, SiteInfo, SiteKind
from moshi_ttt.core.config import DEFAULT_PRECISION, BlockConfig, TTTConfig
from moshi_ttt.core.errors import ConfigError, InjectionError, MoshiTTTError, PluginError
from moshi_ttt.core.host import HostModel
from moshi_ttt.core.host_lookup import host_of
from moshi_ttt.core.layer_spec import resolve_layers
from moshi_ttt.core.precision import DtypeRoles, PrecisionPolicy
from moshi_ttt.core.registry import Registry, Variant, default_registry
from moshi_ttt.core.sharding import assign
from moshi_ttt.core.volume import no_volume

if TYPE_CHECKING:
    from rich.console import Console

logger = logging.getLogger("moshi_ttt.injection")


@dataclass(frozen=True, kw_only=True)
class PlannedBlock:
    """One block of a plan; the figures come from building it on the meta device, so they are exact.

    Attributes:
        trial: that block; it has shapes and dtypes, and no values.
    """

    info: SiteInfo
    variant: Variant
    config: BlockConfig
    roles: DtypeRoles
    parameters: int
    state_bytes: int
    flops_per_token: int
    cast_bytes: int
    trial: SequenceBlock = field(repr=False, compare=False)
    chunk_tokens: int | None = None

    @property
    def site(self) -> Site:
        return self.info.site

    def build(self) -> SequenceBlock:
        """The block on its site's device, uninitialized."""
        return self.variant.factory(self.config, self.info, self.roles)

    def tensors(self) -> dict[str, Tensor]:
        """The block's parameters and persistent buffers by name, on the meta device: what an adapter holds of it.

        Raises ConfigError for state that is no tensor, which an adapter cannot hold.
        """
        return {**dict(self.trial.named_parameters()), **self.trial.persistent_buffers()}


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
        """Build, initialise and attach all blocks. Raises a MoshiTTTError and leaves the model untouched on failure.

        On a meta-device model the blocks are on meta too; call ``Injection.initialise`` once they are materialized.

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
                _fill_blocks(built, self.seed, values)
            elif not any(parameter.is_meta for block in built.values() for parameter in block.parameters()):
                initialise_blocks(built, self.seed)
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

    def initialise(self, *, saved: bool = True) -> None:
        """Give every block its initial values (again): after ``to_empty`` on a model built on the meta device.

        ``saved=False`` leaves out parameters and persistent buffers, which an adapter or a checkpoint is to fill next:
        nothing is drawn for them.
        """
        if saved:
            initialise_blocks(self.blocks, self.plan.seed)
        else:
            _reset_unsaved(self.blocks, self.plan.seed)

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


def initialise_blocks(blocks: dict[Site, SequenceBlock], seed: int) -> None:
    """Initial values, drawn on the CPU from the seed and the site alone: equal on every device, rank and plan."""
    for site, block in blocks.items():
        with torch.no_grad():
            block.reset_parameters(_generator(seed, site))


def _generator(seed: int, site: Site) -> torch.Generator:
    return torch.Generator().manual_seed((seed * 1_000_003 + site.layer) * 2 + (site.kind != SiteKind.SEQUENCE))


def _reset_unsaved(blocks: Mapping[Site, SequenceBlock], seed: int) -> None:
    for site, block in blocks.items():
        with torch.no_grad():
            block.reset_unsaved(_generator(seed, site))


def _fill_blocks(blocks: Mapping[Site, SequenceBlock], seed: int, values: Mapping[str, Tensor]) -> None:
    """Give every parameter and buffer its value. Raises InjectionError unless ``values`` are exactly those needed."""
    own: dict[str, Tensor] = {}
    for site, block in blocks.items():
        own |= {f"{site}.{name}": tensor for name, tensor in block.named_parameters()}
        own |= {f"{site}.{name}": tensor for name, tensor in block.persistent_buffers().items()}
    if apart := sorted(own.keys() ^ values.keys()):
        raise InjectionError(
            f"Nothing was injected: the values are not those of the blocks; on one side only: {', '.join(apart[:8])}."
        )
    if meta := [name for name, tensor in own.items() if tensor.is_meta]:
        raise InjectionError(
            f"Nothing was injected: {meta[0]} is on the meta device and cannot hold a value. Load the model's weights "
            "first."
        )
    problems = [
        f"{name} is {list(values[name].shape)} {values[name].dtype}, and {list(tensor.shape)} {tensor.dtype} is needed"
        for name, tensor in own.items()
        if (values[name].shape, values[name].dtype) != (tensor.shape, tensor.dtype)
    ]
    if problems:
        raise InjectionError(f"Nothing was injected: {'; '.join(problems[:8])}.")
    _reset_unsaved(blocks, seed)
    for name, tensor in own.items():
        assign(tensor, values[name])


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
    adapter = registry.format_adapter(host.format_name)
    sites = {info.site: replace(info, format=adapter) for info in host.sites(model)}
    if not sites:
        raise InjectionError(f"Nothing was injected: host {host.name!r} finds no site in this model.")
    num_layers = 1 + max(site.layer for site in sites)
    problems: list[str] = []
    if host.blocks(model):
        problems.append("The model already has blocks; remove them first (injection.remove()).")
    claimed: dict[Site, str] = {}
    planned: list[PlannedBlock] = []
    for index, entry in enumerate(entries):
        label = f"ttt[{index}] ({entry.variant}, layers {entry.layers!r})"
        try:
            variant = registry.block(entry.qualified_name)
            _require_config(entry, variant)
            kind = getattr(variant.factory, "kind", SequenceBlock.kind)
            layers = resolve_layers(entry.layers, num_layers, _layers_with(kind, sites) or None)
        except (ConfigError, PluginError) as error:
            problems.append(f"{label}: {error}")
            continue
        for layer in layers:
            site = Site(layer, kind)
            if site in claimed:
                problems.append(f"{label}: site {site} is already claimed by {claimed[site]}.")
                continue
            claimed[site] = label
            if site not in sites:
                have = ", ".join(str(s) for s in sites if s.kind == kind) or "none"
                problems.append(f"{label}: host {host.name!r} has no site {site}; {kind} sites: {have}.")
                continue
            try:
                planned.append(_plan_block(sites[site], variant, entry, policy, host))
            except MoshiTTTError as error:
                problems.append(f"{label}: {site}: {error}")
    if problems:
        raise InjectionError("Nothing was injected:\n" + "\n".join(f"- {problem}" for problem in problems))
    return Plan(host=host, policy=policy, seed=seed, blocks=tuple(sorted(planned, key=lambda p: p.site)))


def _layers_with(kind: SiteKind, sites: Mapping[Site, SiteInfo]) -> list[int]:
    return [site.layer for site in sorted(sites) if site.kind is kind]


def _require_config(entry: BlockConfig, variant: Variant) -> None:
    """Raise ConfigError where a configuration is not the variant's own: its options would be missing."""
    if not isinstance(entry, variant.config_class):
        raise ConfigError(
            f"it is a {type(entry).__name__}, and {variant.name!r} of {variant.provenance} needs a "
            f"{variant.config_class.__name__}."
        )


def _plan_block(
    info: SiteInfo, variant: Variant, config: BlockConfig, policy: PrecisionPolicy, host: HostModel
) -> PlannedBlock:
    roles = policy.roles(info.dtype)
    if info.dtype != roles.param:
        raise InjectionError(
            f"the host's parameters are {info.dtype}, policy {policy.name!r} asks for {roles.param}; "
            "load the host in that dtype or choose another policy."
        )
    trial, figures = _trial(info, variant, config, roles)
    if trial.kind != info.site.kind:
        raise InjectionError(
            f"the block is for {trial.kind} sites. A factory function needs an attribute `kind`, as a block class has."
        )
    if host.causal and not trial.causal:
        raise InjectionError(
            f"host {host.name!r} is causal and this block is not: it would see the future inside a chunk. "
            "Set causal: true, or use a host that is not causal."
        )
    if config.output_scale != 1 and not trial.scales_output:
        raise InjectionError(f"output_scale: {config.output_scale:g} {no_volume(type(trial).__name__)}")
    return PlannedBlock(
        info=info,
        variant=variant,
        config=config,
        roles=roles,
        trial=trial,
        **figures,
    )


def _trial(
    info: SiteInfo, variant: Variant, config: BlockConfig, roles: DtypeRoles
) -> tuple[SequenceBlock, dict[str, Any]]:
    """The block on the meta device, what it would be without its memory, and its figures."""
    figures: dict[str, Any] = {}
    try:
        block = variant.factory(config, info.on(torch.device("meta")), roles)
        if isinstance(block, SequenceBlock):
            figures = {
                "parameters": sum(parameter.numel() for parameter in block.parameters()),
                "state_bytes": block.state_bytes(),
                "cast_bytes": block.cast_bytes(),
                "flops_per_token": block.flops_per_token(),
                "chunk_tokens": block.chunk_tokens,
            }
    except MoshiTTTError:
        raise
    except Exception as error:  # a third party's constructor can fail in any way
        raise InjectionError(
            f"variant {variant.name!r} of {variant.provenance} cannot be built: {type(error).__name__}: {error}"
        ) from error
    if not isinstance(block, SequenceBlock):
        raise InjectionError(
            f"variant {variant.name!r} of {variant.provenance} makes a {type(block).__name__}, not a SequenceBlock."
        )
    return block, figures


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
