"""Planning: which block goes to which site, found and checked before the model is touched.

Every block is built once on the meta device, so its figures are exact and a variant that cannot be built is found here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from moshi_ttt.core.block import SequenceBlock, Site, SiteInfo, SiteKind
from moshi_ttt.core.config import BlockConfig
from moshi_ttt.core.errors import ConfigError, InjectionError, MoshiTTTError, PluginError
from moshi_ttt.core.host import HostModel
from moshi_ttt.core.layer_spec import resolve_layers
from moshi_ttt.core.precision import DtypeRoles, PrecisionPolicy
from moshi_ttt.core.registry import Registry, Variant
from moshi_ttt.core.volume import no_volume


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


def plan_blocks(
    model: nn.Module, host: HostModel, entries: Sequence[BlockConfig], *, policy: PrecisionPolicy, registry: Registry
) -> tuple[PlannedBlock, ...]:
    """The blocks that config entries ask for in a model, in layer order.

    Raises:
        InjectionError: with every conflict found; see ``make_plan``.
    """
    layout = registry.format_adapter(host.format_name)
    sites = {info.site: replace(info, format=layout) for info in host.sites(model)}
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
    return tuple(sorted(planned, key=lambda block: block.site))


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
    """The block on the meta device, and its figures by the names of ``PlannedBlock``."""
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
