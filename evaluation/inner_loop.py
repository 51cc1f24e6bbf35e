"""The inner loss by position: at the initial fast weights, before and after each update, and of the mean target.

Figure 5 of Sun et al. 2024, "Learning to (Learn at Test Time)", arXiv:2407.04620, for every block and head on
recordings. Each recording is one plain forward pass from its beginning, so limit its length to what fits into memory.
Position t is the model's input at frame t: the start token at 0, then the recording one frame late.

Shape legend: B recordings in a batch, Q rows of the language model, H heads of a block, T frames.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from moshi_ttt.core.deprecation import renamed_arguments, renamed_attributes
from moshi_ttt.core.errors import ConfigError
from moshi_ttt.core.inner_losses import SiteCurves, Sums, measured
from moshi_ttt.evaluation.documents import Document
from moshi_ttt.evaluation.models import ModelUnderTest
from moshi_ttt.hosts.moshi.losses import delayed
from moshi_ttt.system.report.inner_losses import plot_site
from moshi_ttt.system.report.tables import image, table, version_text
from moshi_ttt.system.report.writer import numbers, versions, write_report

TENSORS = "curves.safetensors"


@renamed_attributes(subject="model")
@dataclass(frozen=True, kw_only=True)
class InnerLoop:
    """The results of the evaluation; ``smooth`` is the window of the plots' running mean, in frames."""

    model: str
    sites: list[SiteCurves]
    recordings: list[str]
    frames: int
    smooth: int
    facts: dict[str, Any] = field(default_factory=dict)


@renamed_arguments(subject="tested")
@torch.no_grad()
def evaluate(
    tested: ModelUnderTest,
    documents: Sequence[Document],
    *,
    batch_size: int,
    smooth: int,
    on_batch: Callable[[], None] = lambda: None,
) -> InnerLoop:
    """The curves of every block of ``tested`` that has an inner loss, over ``documents`` from their beginning.

    Recordings of equal length form a batch, so that no token is padding. The model is unchanged afterwards.
    ``smooth`` frames are averaged in the plots alone.

    Raises ConfigError: the model has no block with an inner loss, there are no recordings, or none has a whole chunk.
    """
    for name, value in (("batch_size", batch_size), ("smooth", smooth)):
        if value < 1:
            raise ConfigError(f"{name} {value}: give 1 or more.")
    if tested.injection is None:
        raise ConfigError(f"{tested.name} has no blocks, so no inner loss. Give an adapter that has some.")
    if not documents:
        raise ConfigError("There are no recordings. Give one or more.")
    frames = max(document.frames for document in documents)
    model = tested.model
    with tested.present():
        sums = {site: Sums(block, frames) for site, block in sorted(tested.injection.blocks.items())}
        for codes in _batches(documents, batch_size):
            with measured(sums):
                model.forward_text(delayed(model, codes.to(model.device))[:, :, :-1])
            on_batch()
    sites = [each.curves(site) for site, each in sums.items() if each.values]
    if not sites:
        variants = sorted({str(each.block.config.variant) for each in sums.values()})
        raise ConfigError(
            f"The blocks of {tested.name} ({', '.join(variants)}) have no inner loss. Give another adapter."
        )
    if all(site.by_position["after"].isnan().all() and not site.not_finite for site in sites):
        raise ConfigError(
            f"None of {len(documents)} recordings has a whole chunk of any block, so there is no update: the longest "
            f"has {frames} frames. Give longer recordings, or raise --max-seconds."
        )
    recordings = [document.name for document in documents]
    return InnerLoop(model=tested.name, sites=sites, recordings=recordings, frames=frames, smooth=smooth)


def _batches(documents: Sequence[Document], size: int) -> Iterator[Tensor]:
    """Codes ``[B, Q, T]`` of up to ``size`` recordings that are equally long."""
    ordered = sorted(documents, key=lambda document: (-document.frames, document.name))
    for _, group in groupby(ordered, key=lambda document: document.frames):
        yield from torch.stack([document.codes for document in group]).split(size)


def write_inner_loop(folder: Path, result: InnerLoop, *, made_by: str, frame_seconds: float) -> None:
    """metrics.json, report.md, a plot for each site, and curves.safetensors: each head's losses by position."""
    values = {
        "made_by": made_by, "versions": versions(), **result.facts, "subject": result.model, "frames": result.frames,
        "smooth_frames": result.smooth, "recordings": result.recordings,
        "sites": [_site(site) for site in result.sites],
    }  # fmt: skip
    tensors = {
        f"{site.site}.{name}": curve.float() for site in result.sites for name, curve in site.by_position.items()
    }
    save_file({name: curve.contiguous() for name, curve in tensors.items()}, folder / TENSORS)
    lines = [
        f"# Inner loss of {result.model} by position", "",
        *(f"- {name}: {value}" for name, value in result.facts.items()),
        f"- recordings: {len(result.recordings)}, up to {result.frames * frame_seconds:.1f} s of each",
        f"- {version_text()}", "",
        "Means over the tokens of whole chunks after the first, of all recordings. *initial*: at the learned initial "
        "weights; *before* and *after*: at the weights before and after the update of the token's own chunk; "
        "*baseline*: of predicting the recording's mean target. Not weighted by the inner learning rate. gating_mlp "
        "with update: hebbian does not minimize this loss: there it is a diagnostic.", "",
    ]  # fmt: skip
    for site in result.sites:
        lines += _section(site, frame_seconds)
        count = len(result.recordings)
        title = f"{result.model}, {site.site} ({site.variant}), {count} recording{'s' * (count > 1)}"
        plot_site(folder / f"{site.site}.png", site, title=title, smooth=result.smooth, frame_seconds=frame_seconds)
    write_report(folder, values, lines)


def _site(site: SiteCurves) -> dict[str, Any]:
    return {
        "site": site.site, "variant": site.variant, "first_updated_position": site.first_updated,
        "tokens": site.tokens, "not_finite": site.not_finite,
        "mean_by_head": {name: numbers(mean) for name, mean in site.means.items()},
        "after_minus_before_by_head": numbers(site.means["after"] - site.means["before"]),
        "mean_of_heads_by_position": {name: numbers(curve.mean(0)) for name, curve in site.by_position.items()},
    }  # fmt: skip


def _section(site: SiteCurves, frame_seconds: float) -> list[str]:
    lines = [f"## {site.site} ({site.variant})", ""]
    if site.tokens:
        start = site.first_updated * frame_seconds
        lines += [f"{site.tokens} tokens, the first at {start:.1f} s of its recording.", ""]
    else:
        lines += ["No update took effect on a whole chunk: there is nothing to average.", ""]
    if site.not_finite:
        lines += [f"**{site.not_finite} losses are not finite, and not in the table: lower the learning rate.**", ""]
    by_head = {**site.means, "change": site.means["after"] - site.means["before"]}  # each [H]
    columns = [by_head[name].tolist() for name in ("initial", "before", "after", "change", "baseline")]
    rows = [
        (str(head), *(f"{value:.5g}" if math.isfinite(value) else "" for value in row))
        for head, row in enumerate(zip(*columns, strict=True))
    ]
    lines += table(("head", "initial", "before", "after", "after - before", "baseline"), rows, "rrrrrr")
    return [*lines, "", *image(site.site, f"{site.site}.png")]
