"""``moshi-ttt train --plan``: what a run trains and the memory of each rank, from the architecture alone.

No weights are read and no process group is needed: the model stays on the meta device, and the sizes of its shards are
computed as FSDP2 cuts them. The plan is of plain values; ``dataclasses.asdict`` makes JSON of it; see ``plan_tables``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from torch import Tensor, nn

from moshi_ttt.configs.settings import Settings
from moshi_ttt.core.deprecation import moved_names
from moshi_ttt.core.errors import ConfigError
from moshi_ttt.core.registry import Registry
from moshi_ttt.hosts.moshi.host import main_layers
from moshi_ttt.hosts.moshi.upstream import FRAME_RATE
from moshi_ttt.training import export
from moshi_ttt.training.activations import step_bytes
from moshi_ttt.training.model import skeleton
from moshi_ttt.training.optimizer import rates, reach, too_low
from moshi_ttt.training.trained import TrainedModel

__getattr__ = moved_names(
    __name__, None, {name: f"moshi_ttt.training.plan_tables:{name}" for name in ("groups_table", "render")}
)  # fmt: skip
FROZEN = "frozen"
ROOT = "root"
"""What the last unit is called: the parameters that no other unit contains."""


@dataclass(frozen=True, kw_only=True)
class GroupPlan:
    """Parameters that share a learning rate.

    Attributes:
        name: ``ttt``, ``gates``, ``lora``, ``base`` or ``frozen``.
        parameters, tensors: how many there are.
        stored_as: dtypes, joined by commas.
        learning_rate: the highest one; None where nothing is trained.
        reach: about the most by which training moves a parameter; None where nothing is trained.
    """

    name: str
    parameters: int
    tensors: int
    stored_as: str
    learning_rate: float | None
    reach: float | None


@dataclass(frozen=True, kw_only=True)
class UnitPlan:
    """A unit of sharding, whose parameters are gathered together.

    Attributes:
        name: the module's path in the model; ``root`` for the model itself.
        gathered_bytes: its parameters, whole, in the dtype they are gathered in.
        unreduced_bytes: the gradients of those that are trained, whole, in the dtype they are added up in.
    """

    name: str
    gathered_bytes: int
    unreduced_bytes: int


@dataclass(frozen=True, kw_only=True)
class RankPlan:
    """Bytes on the rank that holds most.

    Attributes:
        parameters: its shards, as stored.
        gradients: of the trained ones, in the dtype they are stored in.
        moments: AdamW's two.
        gathered: what is whole at a time: the root unit from forward to backward, a unit, and the next one.
        unreduced: gradients before ranks have exchanged them: of the largest unit; of all units where several
            micro-batches add up and ranks exchange gradients once a step.
        carried: with ``carry_state``, the states of all rows before the step and after it.
        activations: what one micro-batch adds to these at its peak, when whole gradients may not all be there yet; None
            where it was not counted.
    """

    parameters: int
    gradients: int
    moments: int
    gathered: int
    unreduced: int
    carried: int
    activations: int | None = None

    @property
    def total(self) -> int:
        """All bytes without activations."""
        return self.parameters + self.gradients + self.moments + self.gathered + self.unreduced + self.carried


@dataclass(frozen=True, kw_only=True)
class TrainingPlan:
    """What a run trains, and the memory it needs.

    Attributes:
        model: which Moshi.
        blocks: site and variant of each block.
        ranks: how many processes.
        shards: ranks that share one copy of the model.
        waiting: whether gradients of several micro-batches add up before ranks exchange them.
        groups: the trained groups, then what is frozen.
        low_rates: what to do about groups of new blocks whose learning rate cannot train them.
        units: the units of sharding; the last one is the root.
        rank: bytes on the rank that holds most.
        state_bytes: memory of one stream in all blocks.
        carried_rows: rows whose state one rank carries; 0 without ``carry_state``.
        kept_layers: layers of the main transformer that gradients pass through.
        layer_input_bytes: the inputs of those layers for one micro-batch, kept for backward even with checkpointing: a
            lower bound of the activations.
    """

    model: str
    blocks: tuple[str, ...]
    ranks: int
    shards: int
    waiting: bool
    groups: tuple[GroupPlan, ...]
    low_rates: tuple[str, ...]
    units: tuple[UnitPlan, ...]
    rank: RankPlan
    state_bytes: int
    carried_rows: int
    kept_layers: int
    layer_input_bytes: int

    @property
    def largest_unit(self) -> UnitPlan:
        """The unit that takes most when it is whole."""
        return max(self.units, key=lambda unit: unit.gathered_bytes)


def plan(
    settings: Settings, registry: Registry | None = None, *, ranks: int, activations: bool = False
) -> TrainingPlan:
    """The plan of a run on ``ranks`` processes.

    Args:
        activations: count them too, by one step without values: seconds, and up to a minute for a large model.

    Raises:
        ConfigError: the number of ranks is no multiple of ``shard_size``, or the run could not export what it trains.
        HostError: a model that cannot be trained here.
        InjectionError: the blocks do not fit the model.
    """
    assert ranks > 0, ranks
    shards = settings.run.shard_size or ranks
    if ranks % shards:
        raise ConfigError(
            f"shard_size is {shards}, and {ranks} ranks are no multiple of it. "
            "Plan for a multiple with --ranks, change shard_size, or leave it out to share one copy over all ranks."
        )
    export.check(settings)
    trained, run = skeleton(settings, registry), settings.run
    planned = plan_model(trained, settings, ranks=ranks, shards=shards)
    if not activations:
        return planned
    step = step_bytes(
        trained, rows=run.batch_size, frames=_frames(settings), carried=run.carry_state, gradients=shards == 1
    )
    # On one rank the step's peak has those gradients in it that are there by then; they have a line of their own.
    apart = planned.rank.gradients if shards == 1 else 0
    return replace(planned, rank=replace(planned.rank, activations=max(0, step.peak - apart)))


def _frames(settings: Settings) -> int:
    return math.ceil(round(settings.run.duration_sec * FRAME_RATE, 6))


def plan_model(trained: TrainedModel, settings: Settings, *, ranks: int, shards: int) -> TrainingPlan:
    """The plan for a model that is at hand, unsharded: on the meta device or not."""
    run, injection = settings.run, trained.injection
    units = tuple(_units(trained))
    stored = list(trained.model.parameters())
    learning = list(trained.trained().values())
    waiting = run.num_microbatches > 1 and not run.full_finetuning  # see Trainer
    of_units = [unit.unreduced_bytes for unit in units]
    state_bytes = injection.plan.state_bytes
    carried_rows = run.batch_size * run.num_microbatches if run.carry_state else 0
    held = RankPlan(
        parameters=_bytes_of_largest_shards(stored, shards),
        gradients=_bytes_of_largest_shards(learning, shards),
        moments=2 * _bytes_of_largest_shards(learning, shards),
        gathered=units[-1].gathered_bytes + 2 * max((unit.gathered_bytes for unit in units[:-1]), default=0),
        unreduced=sum(of_units) if waiting else max(of_units),
        carried=2 * carried_rows * state_bytes,
    )
    layers = _layers_with_gradients(trained)
    frames = _frames(settings)
    return TrainingPlan(
        model=settings.host.hf_repo,
        blocks=tuple(f"{block.site} ({block.variant.name})" for block in injection.plan.blocks),
        ranks=ranks,
        shards=shards,
        waiting=waiting,
        groups=tuple(group_plans(trained, settings)),
        low_rates=tuple(low_rates(trained, settings)),
        units=units,
        rank=held,
        state_bytes=state_bytes,
        carried_rows=carried_rows,
        kept_layers=layers,
        layer_input_bytes=layers * run.batch_size * frames * trained.model.dim * trained.roles.param.itemsize,
    )


def group_plans(trained: TrainedModel, settings: Settings) -> Iterator[GroupPlan]:
    """The trained groups with their highest learning rates, then what is frozen."""
    rate, steps = rates(settings.run.optim), settings.run.max_steps
    for name, members in trained.groups().items():
        yield _group(name, members.values(), rate[name], reach(rate[name], steps))
    frozen = [parameter for parameter in trained.model.parameters() if not parameter.requires_grad]
    yield _group(FROZEN, frozen, None, None)


def low_rates(trained: TrainedModel, settings: Settings) -> Iterator[str]:
    """A sentence for each group of new blocks whose learning rate cannot train it."""
    if settings.run.adapter is None:  # blocks that have been trained may be moved a little
        for group in trained.groups():
            if (problem := too_low(settings.run.optim, group, settings.run.max_steps)) is not None:
                yield problem


def _group(name: str, members: Iterable[Tensor], rate: float | None, moves: float | None) -> GroupPlan:
    members = list(members)
    dtypes = sorted({str(parameter.dtype).removeprefix("torch.") for parameter in members})
    return GroupPlan(
        name=name, parameters=sum(parameter.numel() for parameter in members), tensors=len(members),
        stored_as=", ".join(dtypes), learning_rate=rate, reach=moves,
    )  # fmt: skip


def _units(trained: TrainedModel) -> Iterator[UnitPlan]:
    """The units as ``core.sharding.shard`` makes them: a parameter is in the innermost unit that contains it."""
    model, roles = trained.model, trained.roles
    paths = {id(module): path for path, module in model.named_modules()}
    as_stored = {id(unit) for unit in trained.host.stored_units(model)}
    taken: set[int] = set()
    for unit in trained.host.fsdp_units(model):  # the inner ones come first
        own = [parameter for parameter in unit.parameters() if id(parameter) not in taken]
        taken |= {id(parameter) for parameter in own}
        yield UnitPlan(
            name=paths[id(unit)] or ROOT,
            gathered_bytes=sum(
                parameter.numel() * (parameter.dtype if id(unit) in as_stored else roles.param).itemsize
                for parameter in own
            ),
            unreduced_bytes=sum(p.numel() for p in own if p.requires_grad) * roles.reduce.itemsize,
        )


def _bytes_of_largest_shards(parameters: Iterable[nn.Parameter], shards: int) -> int:
    """Bytes on the first of ``shards`` ranks, which has the most rows of each parameter: FSDP2 cuts dimension 0."""
    return sum(
        math.ceil(parameter.shape[0] / shards) * math.prod(parameter.shape[1:]) * parameter.dtype.itemsize
        for parameter in parameters
    )


def _layers_with_gradients(trained: TrainedModel) -> int:
    """Main layers that gradients pass through: from the first one that trains something, or that follows what does."""
    model = trained.model
    layers = main_layers(model)
    if any(parameter.requires_grad for table in (model.emb, model.text_emb) for parameter in table.parameters()):
        return len(layers)
    learning = [any(parameter.requires_grad for parameter in layer.parameters()) for layer in layers]
    return len(layers) - learning.index(True) if True in learning else 0
