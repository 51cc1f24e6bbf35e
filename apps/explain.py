"""``moshi-ttt explain``: show what a config adds to its host, and in which dtypes, without reading weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from torch import nn

from moshi_ttt.configs.reading import read_config
from moshi_ttt.core.config import HostConfig, TTTConfig
from moshi_ttt.core.injection import Plan, make_plan
from moshi_ttt.core.precision import DtypeRoles
from moshi_ttt.core.registry import Registry, default_registry
from moshi_ttt.core.units import human_bytes, human_count

ROLES = {
    "master": "the blocks' parameters as stored, optimizer moments",
    "param": "frozen host parameters",
    "state": "fast weights and the unfinished chunk, from call to call",
    "compute": "norms, reconstruction target, learned rates",
    "rope": "rotary embedding",
    "matmul": "inputs of the blocks' projections",
    "reduce": "gradient reduction across ranks",
    "output": "where the gated update is added to the residual",
}


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """A plan, and the facts that are shown with it."""

    name: str
    host: HostConfig
    plan: Plan
    roles: DtypeRoles
    base_parameters: int


def explain(name: str, *, registry: Registry | None = None) -> Explanation:
    """Resolve a config (a path or a packaged name) against its host's architecture on the meta device.

    Raises ConfigError, PluginError, HostError or InjectionError; each says what to change.
    """
    registry = registry or default_registry()
    config = read_config(name, registry=registry)
    host = registry.host(config.host.qualified_name)
    return explain_model(host.skeleton(config.host), config, name=name, registry=registry)


def explain_model(model: nn.Module, config: TTTConfig, *, name: str, registry: Registry | None = None) -> Explanation:
    """``explain`` for a model that is already built."""
    registry = registry or default_registry()
    host = registry.host(config.host.qualified_name)
    policy = registry.policy(config.precision)
    plan = make_plan(model, host, config.ttt, policy=policy, registry=registry, seed=config.seed)
    return Explanation(
        name=name,
        host=config.host,
        plan=plan,
        roles=policy.roles(host.sites(model)[0].dtype),
        base_parameters=sum(parameter.numel() for parameter in model.parameters()),
    )


def to_json(explanation: Explanation) -> dict[str, Any]:
    """The explanation as values for JSON, with exact numbers."""
    plan = explanation.plan
    return {
        "config": explanation.name,
        "host": explanation.host.model_dump(mode="json"),
        "base_parameters": explanation.base_parameters,
        "precision": {"policy": explanation.roles.policy, **dict(_roles(explanation.roles))},
        "blocks": [
            {
                "site": str(block.site),
                "variant": block.variant.name,
                "plugin": block.variant.provenance.plugin,
                "distribution": block.variant.provenance.distribution,
                "version": block.variant.provenance.version,
                "parameters": block.parameters,
                "state_bytes": block.state_bytes,
                "cast_bytes": block.cast_bytes,
                "flops_per_token": block.flops_per_token,
                "config": block.config.model_dump(mode="json", exclude={"layers"}),
            }
            for block in plan.blocks
        ],
        "totals": {
            "parameters": plan.parameters,
            "state_bytes": plan.state_bytes,
            "cast_bytes": plan.cast_bytes,
            "flops_per_token": sum(block.flops_per_token for block in plan.blocks),
        },
    }


def render(explanation: Explanation) -> RenderableType:
    """Two tables: the plan, and the dtype of each role."""
    plan = explanation.plan
    host = ", ".join(f"{key} {value}" for key, value in explanation.host.model_dump().items() if value is not None)
    casts = f"; a stream keeps {human_bytes(plan.cast_bytes)} of casts for all rows" if plan.cast_bytes else ""
    table = Table(
        title=f"{explanation.name}: what injection adds to a base of {explanation.base_parameters:,} parameters",
        caption=f"host: {host}{casts}",
        title_justify="left",
        caption_justify="left",
        show_footer=True,
    )
    flops = sum(block.flops_per_token for block in plan.blocks)
    share = plan.parameters / explanation.base_parameters if explanation.base_parameters else 0.0
    table.add_column("site", footer=f"{len(plan.blocks)} blocks", no_wrap=True)
    table.add_column("variant", no_wrap=True)
    table.add_column("plugin")
    table.add_column("parameters\nadded", footer=f"{plan.parameters:,}\n({share:.2%} of base)", justify="right")
    table.add_column("state\nper stream", footer=human_bytes(plan.state_bytes), justify="right")
    table.add_column("extra FLOPs\nper token", footer=human_count(flops), justify="right")
    table.add_column("output\nscale", justify="right")
    for block in plan.blocks:
        provenance = block.variant.provenance
        table.add_row(
            str(block.site), block.variant.name, f"{provenance.distribution} {provenance.version}",
            f"{block.parameters:,}", human_bytes(block.state_bytes), human_count(block.flops_per_token),
            f"{block.config.output_scale:g}",
        )  # fmt: skip
    roles = Table(title=f"precision policy {explanation.roles.policy}", title_justify="left")
    for heading in ("role", "dtype", "what it holds"):
        roles.add_column(heading, no_wrap=heading != "what it holds")
    for role, dtype in _roles(explanation.roles):
        roles.add_row(role, dtype, ROLES.get(role, ""))
    return Group(table, "", roles)


def _roles(roles: DtypeRoles) -> Iterator[tuple[str, str]]:
    for field in fields(roles):
        if field.name not in ("policy", "model"):
            yield field.name, str(getattr(roles, field.name)).removeprefix("torch.")
