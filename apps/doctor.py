"""``moshi-ttt doctor CONFIG``: run a few batches through the blocks of a config, and report their problems."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text
from torch import nn

from moshi_ttt.configs.reading import read_config
from moshi_ttt.core.adapter import find_adapter, load_adapter
from moshi_ttt.core.block import Site
from moshi_ttt.core.errors import ConfigError
from moshi_ttt.core.health import BlockHealth, HealthMonitor, chunk_of, dead_block_flag, sample_length
from moshi_ttt.core.injection import Injection, inject
from moshi_ttt.core.registry import Registry, default_registry
from moshi_ttt.hosts.moshi.host import MOSHI_HOST, MoshiHostConfig
from moshi_ttt.system import threads
from moshi_ttt.system.report.writer import number


@dataclass(frozen=True, kw_only=True)
class Examination:
    """The health of the blocks, and the model, data and options it was measured with."""

    config: str
    batches: int
    length: int
    blocks: dict[Site, BlockHealth]

    @property
    def healthy(self) -> bool:
        return not any(health.red_flags for health in self.blocks.values())


def examine(
    config: str,
    registry: Registry | None = None,
    *,
    adapter: Path | None,
    batches: int,
    length: int | None,
    seed: int,
    processor_threads: int | None = None,
) -> Examination:
    """Load the config's model, add its blocks (or an adapter's), and measure them.

    ``length=None`` is two chunks and a token of the longest chunk, and 64 tokens at least;
    ``processor_threads=None`` chooses by the model's size. Raises MoshiTTTError.
    """
    registry = registry or default_registry()
    parsed = read_config(config, registry=registry)
    if adapter is None:
        injection = inject(registry.host(parsed.host.qualified_name).load(parsed.host), parsed, registry=registry)
    else:
        folder = find_adapter(adapter)
        if isinstance(parsed.host, MoshiHostConfig):
            model: nn.Module = MOSHI_HOST.load_for_adapter(parsed.host, folder)
        else:
            model = registry.host(parsed.host.qualified_name).load(parsed.host)
        injection = load_adapter(model, folder, registry=registry)
    if not injection.blocks:
        raise ConfigError(f"{config} has no blocks to examine. Give its ttt list an entry.")
    injection.freeze_base()
    length = length or max(sample_length(block) for block in injection.blocks.values())
    with threads.computing(threads.largest(injection.model), processor_threads):
        found = measure(injection, batches=batches, length=length, seed=seed)
    return Examination(config=config, batches=batches, length=length, blocks=found)


def measure(injection: Injection, *, batches: int, length: int, seed: int = 0) -> dict[Site, BlockHealth]:
    """The health of every block over ``batches`` training passes, backward included; no parameter is changed.

    Figures are the worst of all batches, each by itself (the smallest of those called smallest); red flags are theirs.
    Raises ConfigError when so few tokens make no update.
    """
    host, model, blocks = injection.host, injection.model, injection.blocks
    longest = max(chunk_of(block) for block in blocks.values())
    if batches * length <= longest:
        raise ConfigError(
            f"{batches} passes of {length} tokens are not longer than one chunk of {longest}: no update could take "
            "effect. Give a greater --length or more --batches."
        )
    worst: dict[Site, dict[str, float]] = {site: {} for site in blocks}
    carried = None
    with HealthMonitor(blocks) as monitor:
        for batch in range(batches):
            with host.carry(model, carried) as carried:
                loss = host.synthetic_loss(model, batch_size=1, length=length, seed=seed + batch)
            if loss.requires_grad:
                loss.backward()
            for site, health in monitor.read().items():
                worst[site] = _worse(worst[site], health.figures)
    found = {}
    for site, block in blocks.items():
        found[site] = BlockHealth(worst[site], [*monitor.red_flags(site, worst[site]), *dead_block_flag(block)])
        block.zero_grad()
    return found


def _worse(one: Mapping[str, float], other: Mapping[str, float]) -> dict[str, float]:
    def choose(name: str, a: float, b: float) -> float:
        if math.isnan(a) or math.isnan(b):
            return math.nan
        return min(a, b) if name.endswith(("smallest", "_last")) else max(a, b)

    return {name: choose(name, one.get(name, value), value) for name, value in other.items()}


def render(examination: Examination) -> RenderableType:
    """A table with a row for each figure and a column for each block, then the red flags."""
    blocks = examination.blocks
    table = Table(
        title=f"{examination.config}: {examination.batches} batches of {examination.length} made-up tokens",
        title_justify="left",
    )
    table.add_column("figure", no_wrap=True)
    for site in blocks:
        table.add_column(str(site), justify="right")
    for name in dict.fromkeys(name for health in blocks.values() for name in health.figures):
        table.add_row(name, *(_shown(health.figures.get(name)) for health in blocks.values()))
    verdicts = [Text("RED", "red") if health.red_flags else Text("healthy", "green") for health in blocks.values()]
    table.add_row("", *verdicts)
    flags = [f"{site}: {flag}" for site, health in blocks.items() for flag in health.red_flags]
    return Group(table, *(Text(flag, style="red", overflow="fold") for flag in flags))


def _shown(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def to_json(examination: Examination) -> dict[str, Any]:
    """Numbers and flags; a figure that is not finite is null."""
    return {
        "config": examination.config,
        "batches": examination.batches,
        "length": examination.length,
        "healthy": examination.healthy,
        "blocks": {
            str(site): {
                "figures": {name: number(value) for name, value in health.figures.items()},
                "red_flags": health.red_flags,
            }
            for site, health in examination.blocks.items()
        },
    }
