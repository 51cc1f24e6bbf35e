"""The tables of ``moshi-ttt train --plan``: what is trained, and the bytes of a rank."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from rich.console import Group as Stack
from rich.console import RenderableType
from rich.table import Table

from moshi_ttt.core.units import human_bytes
from moshi_ttt.training.planning import GroupPlan, TrainingPlan


def render(plan: TrainingPlan) -> RenderableType:
    """What is trained, and the bytes of a rank, as two tables and a few lines."""
    groups = groups_table(plan.groups, title=f"{plan.model}: what is trained")
    warnings = [f"Warning: {problem}" for problem in plan.low_rates]
    blocks = f"blocks: {', '.join(plan.blocks) or 'none'}"
    return Stack(groups, *warnings, blocks, "", _rank_table(plan), *_notes(plan))


def groups_table(groups: Iterable[GroupPlan], title: str | None = None) -> Table:
    """What is trained, and what is frozen, a line for each group."""
    table = Table(title=title, title_justify="left")
    for heading in ("group", "parameters", "tensors", "stored as", "learning rate", "moves a parameter by at most"):
        table.add_column(heading, justify="right" if heading in ("parameters", "tensors") else "left")
    for group in groups:
        rate = "" if group.learning_rate is None else f"{group.learning_rate:g}"
        moves = "" if group.reach is None else f"{group.reach:.1g}"
        table.add_row(group.name, f"{group.parameters:,}", str(group.tensors), group.stored_as, rate, moves)
    return table


def _rank_table(plan: TrainingPlan) -> Table:
    rank, root = plan.rank, plan.units[-1].gathered_bytes
    largest = max((unit.gathered_bytes for unit in plan.units[:-1]), default=0)
    waiting = "of all units: ranks exchange them once a step" if plan.waiting else "of the largest unit"
    table = Table(title=f"Bytes on {_which(plan)}", title_justify="left")
    table.add_column("what")
    table.add_column("bytes", justify="right", no_wrap=True)
    table.add_column("how it is counted")
    rows = [
        ("parameters", rank.parameters, "its share of each, as stored"),
        ("gradients", rank.gradients, "its share, of what is trained"),
        ("AdamW moments", rank.moments, "two for each gradient"),
        (
            "gathered parameters", rank.gathered,
            f"the root, whole from forward to backward ({human_bytes(root)}), and the largest other unit twice "
            f"({human_bytes(largest)} each): the next is fetched meanwhile",
        ),
        ("gradients not yet exchanged", rank.unreduced, f"whole, {waiting}"),
    ]  # fmt: skip
    if plan.carried_rows:
        counted = f"{plan.carried_rows} row(s) of {human_bytes(plan.state_bytes)}, before the step and after it"
        rows.append(("carried memory", rank.carried, counted))
    for what, count, how in rows:
        table.add_row(what, human_bytes(count), how)
    table.add_section()
    table.add_row("total before activations", human_bytes(rank.total), "")
    if rank.activations is not None:
        counted = "one micro-batch, forward and backward, at its peak"
        table.add_row("activations", human_bytes(rank.activations), counted)
        table.add_section()
        table.add_row("peak", human_bytes(rank.total + rank.activations), "")
    return table


def _which(plan: TrainingPlan) -> str:
    if plan.ranks == 1:
        return "the one rank"
    copies = plan.ranks // plan.shards
    shared = f"{copies} copies of the model, each on {plan.shards}" if copies > 1 else "which share the model"
    return f"the rank that holds most, of {plan.ranks}: {shared}"


def _notes(plan: TrainingPlan) -> Iterator[str]:
    largest, whole = plan.largest_unit, human_bytes(plan.largest_unit.gathered_bytes)
    yield f"{len(plan.units)} units of sharding; the largest of them, {largest.name}, is {whole} when it is whole"
    yield f"memory of the blocks: {human_bytes(plan.state_bytes)} a stream"
    if plan.rank.activations is None:
        yield (
            f"Activations are not in the total. At least {human_bytes(plan.layer_input_bytes)} of them: the inputs of "
            f"the {plan.kept_layers} main layers that gradients pass through, which checkpointing keeps too. Logits, "
            "the depformer, a layer computed again and the inner loops of the blocks come on top."
        )
    else:
        yield (
            "Not in the peak: what the device's driver and its libraries take, what the allocator keeps between "
            "tensors, buffers in which ranks exchange, and what the optimizer step makes for a moment."
        )
