"""``moshi-ttt plugins``: list every registered name with its provider, and every plugin that did not load."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from moshi_ttt.core.registry import Registry, default_registry


def render(registry: Registry | None = None) -> RenderableType:
    """A table of names, then one line for each plugin that is not loaded, with the reason."""
    registry = registry or default_registry()
    table = Table(title="moshi-ttt plugins", title_justify="left")
    for heading in ("name", "kind", "distribution", "version", "status"):
        table.add_column(heading, no_wrap=heading in ("name", "kind"))
    known = {record.provenance for record in registry.plugins()}
    for entry in registry.entries():
        claims = registry.claims(entry.kind, entry.name)
        for where in claims:
            status = Text("loaded" if where in known else "run time", style="green")
            if len(claims) > 1:
                status = Text("claimed twice", style="red")
            table.add_row(entry.name, entry.kind.replace("_", " "), where.distribution, where.version, status)
    problems = [record for record in registry.plugins() if record.status != "loaded"]
    for record in problems:
        where = record.provenance
        style = "dim" if record.status == "disabled" else "red"
        table.add_row(where.plugin, "plugin", where.distribution, where.version, Text(record.status, style=style))
    reasons = [
        Text(f"{record.provenance.plugin}: {record.status}: {record.reason}", overflow="fold") for record in problems
    ]
    missing = [Text(registry.missing_message(), style="red")] if registry.missing_message() else []
    return Group(table, *reasons, *missing)
