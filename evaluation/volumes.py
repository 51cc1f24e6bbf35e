"""Recall against its cost, by volume: the gain in the second presentation of a clip, and the loss added in the first.

Shape legend: R recordings.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matplotlib.axes import Axes
from torch import Tensor

from moshi_ttt.core.config import LARGEST_VOLUME
from moshi_ttt.core.deprecation import renamed_attributes
from moshi_ttt.core.errors import ConfigError
from moshi_ttt.core.volume import require_volume
from moshi_ttt.evaluation.statistics import Interval, as_json, bootstrap, mean_of_rows
from moshi_ttt.system.report.figures import interval_bar, legend_outside, panels, rule, save, style
from moshi_ttt.system.report.tables import image, table
from moshi_ttt.system.report.writer import number, numbers

if TYPE_CHECKING:
    from moshi_ttt.evaluation.models import ModelUnderTest

PICTURE = "recall_by_volume.png"
LABEL_PLACES = ((5, 5), (5, -12), (-22, 5), (-22, -12), (5, 16), (5, -23))
"""Of a text beside its point, in points."""
FIGURES = ("recall", "cost", "saved")
ARE_THE_BASES = "are the base model's, bit for bit"


@renamed_attributes(subject="model")
@dataclass(frozen=True, kw_only=True)
class AtVolume:
    """One model at one volume, updates on. Nats per audio token, of the frames that recall counts.

    Attributes:
        recall: ``[R]``, the gain of the second presentation beyond the base model's.
        cost: ``[R]``, the loss of the first presentation minus the base model's; below 0 it is better.
        saved: ``[R]``, the base model's loss of the second presentation minus this one.
        apart: the largest difference of any loss, over all presentations and frames, from the base model's.
        output_scales: as ``own_scales``; the volume multiplies them.
    """

    model: str
    volume: float
    recall: Tensor
    cost: Tensor
    saved: Tensor
    apart: float
    output_scales: tuple[float, ...]

    def interval(self, name: str, seed: int) -> Interval:
        """Of ``recall``, ``cost`` or ``saved``: the mean over recordings."""
        return bootstrap(getattr(self, name), mean_of_rows, seed=seed)


def read_volumes(texts: Sequence[str]) -> tuple[float, ...]:
    """The numbers of ``--volume 0,0.25,0.5,1``, ascending. Raises ConfigError for anything else, or a number twice."""
    found: dict[float, str] = {}
    for item in ",".join(texts).split(","):
        try:
            number = math.nan if "_" in item else float(item)  # Python reads 1_0 as 10
        except ValueError:
            number = math.nan
        if not 0 <= number <= LARGEST_VOLUME:
            raise ConfigError(
                f"--volume {','.join(texts)!r}: {item.strip()!r} is no volume. Give numbers from 0 (the base model) to "
                f"{LARGEST_VOLUME:g}, between commas, as in 0,0.25,0.5,1."
            )
        if number in found:
            raise ConfigError(
                f"--volume {','.join(texts)!r}: {found[number]!r} and {item.strip()!r} are one volume. Give each once."
            )
        found[abs(number)] = item.strip()  # -0 is 0
    return tuple(sorted(found))


def refuse_volumes(models: Sequence[ModelUnderTest], volumes: Sequence[float]) -> None:
    """Raise ConfigError where no model has a volume, and ContextError where a block does not follow it."""
    with_blocks = [tested for tested in models if tested.injection is not None]
    if volumes and not with_blocks:
        raise ConfigError(
            "There is no volume without blocks: give an adapter that has some, as in --adapter ttt=RUN, or leave out "
            "--volume."
        )
    for tested in with_blocks if set(volumes) - {1.0} else ():
        with tested.present():
            assert tested.injection is not None
            require_volume(tested.injection.blocks)


def require_base(models: Sequence[ModelUnderTest], volumes: Sequence[float], conditions: Sequence[str]) -> None:
    """Raise ConfigError where volumes are asked for, without the evaluation that they are compared with."""
    if volumes and (models[0].name != "base" or "updates on" not in conditions):
        raise ConfigError(
            f"Volumes are measured against the base model with updates on; given were the models "
            f"{', '.join(tested.name for tested in models)} and the conditions {', '.join(map(repr, conditions))}. "
            "Make 'base' the first model and 'updates on' one of the conditions, or leave out volumes."
        )


def own_scales(tested: ModelUnderTest) -> tuple[float, ...]:
    """The different ``output_scale`` of the blocks of a model, ascending; none without blocks."""
    blocks = {} if tested.injection is None else tested.injection.blocks
    return tuple(sorted({block.config.output_scale for block in blocks.values()}))


def volume_rows(points: Sequence[AtVolume], seed: int) -> list[dict[str, Any]]:
    """The values for metrics.json: intervals, and the numbers of each recording."""
    return [
        {
            "subject": each.model,
            "volume": each.volume,
            "output_scales": list(each.output_scales),
            "largest_difference_from_base": number(each.apart),
        }
        | {name: as_json(each.interval(name, seed)) for name in FIGURES}
        | {f"{name}_by_recording": numbers(getattr(each, name)) for name in FIGURES}
        for each in points
    ]


def volume_lines(points: Sequence[AtVolume], seed: int) -> list[str]:
    """The section of a report, in lines."""
    scales = {each.model: _from_to(each.output_scales) for each in points}
    header = (
        "",
        "volume",
        "recall",
        "cost of the first presentation",
        "second presentation's loss, saved against base",
    )
    rows = [(each.model, f"{each.volume:g}", *(str(each.interval(name, seed)) for name in FIGURES)) for each in points]
    lines = [
        "## By volume", "",
        "The volume multiplies what the blocks add to the base model; the fast weights are updated at every volume. "
        "Recall: the gain of the second presentation beyond the base model's. Cost: the loss of the first presentation "
        "minus the base model's; below 0 it is better. All over the same frames.", "",
        "The volume multiplies the adapter's own `output_scale`: "
        f"{'; '.join(f'{name} {scale}' for name, scale in scales.items())}.", "",
        *table(header, rows),
    ]  # fmt: skip
    for each in points:
        if each.volume == 0:
            apart = (
                f"differ from the base model's by at most {each.apart:.2g}: the volume does not act on what an adapter "
                "has beside its blocks (a LoRA)"
            )
            lines += ["", f"At volume 0, the losses of {each.model} {apart if each.apart else ARE_THE_BASES}."]
    return [*lines, "", *image("recall against cost", PICTURE)]


def _from_to(numbers: Sequence[float]) -> str:
    """The first and the last of ``numbers``, in words; where they are one, it alone."""
    ends = dict.fromkeys([numbers[0], numbers[-1]])
    return " to ".join(f"{number:g}" for number in ends)


def plot_volumes(path: Path, points: Sequence[AtVolume], seed: int, colors: Mapping[str, str]) -> None:
    """One panel: cost to the right, recall upward, a curve for each model with its volumes beside the points."""
    figure, (axes,) = panels(width=7.5, height=5.0)
    rule(axes, x=0, y=0)
    named = []
    for model, color in colors.items():
        own = [each for each in points if each.model == model]
        costs, recalls = ([each.interval(name, seed) for each in own] for name in ("cost", "recall"))
        axes.plot(
            [each.value for each in costs], [each.value for each in recalls], marker="o", markersize=5, linewidth=1.8,
            label=model, color=color,
        )  # fmt: skip
        for each, cost, recall in zip(own, costs, recalls, strict=True):
            interval_bar(axes, cost.low, cost.high, recall.value, color, linewidth=1, alpha=0.6)
            axes.plot([cost.value] * 2, [recall.low, recall.high], linewidth=1, alpha=0.6, color=color)
            if each.volume or each.apart:  # else it is the base model, whatever its name
                named.append((f"{each.volume:g}", (cost.value, recall.value), color))
    axes.set_xlabel("cost of the first presentation (nats/token above the base model; left is better)")
    axes.set_ylabel("recall (nats/token beyond the base model's; up is better)")
    axes.set_title("numbers: volume; bars: 95 % over recordings; the base model is at 0, 0")
    legend_outside(figure)
    style(figure, grid=None)
    figure.draw_without_rendering()  # from here on it is known where points are
    _write_apart(axes, named)
    save(figure, path, grid=None)


def _write_apart(axes: Axes, named: Sequence[tuple[str, tuple[float, float], str]]) -> None:
    """Each text beside its point, where no other is; left out where there is no such place."""
    taken: list[tuple[float, float]] = []
    scale = float(axes.figure.dpi) / 72
    for text, point, color in named:
        x, y = axes.transData.transform(point)
        for right, up in LABEL_PLACES:
            place = (x + right * scale, y + up * scale)
            if all(abs(place[0] - a) > 24 * scale or abs(place[1] - b) > 9 * scale for a, b in taken):
                taken.append(place)
                axes.annotate(
                    text, point, xytext=(right, up), textcoords="offset points", fontsize=8, color=color,
                    bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5, "alpha": 0.7},
                )  # fmt: skip
                break
