"""The log of a run: a progress line, ``metrics.jsonl`` always, TensorBoard and Weights & Biases where asked for."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from moshi_ttt.configs.training import RunConfig, WandbConfig
from moshi_ttt.core.atomic import atomic_file
from moshi_ttt.core.block import Site
from moshi_ttt.core.errors import ConfigError
from moshi_ttt.core.health import BlockHealth
from moshi_ttt.core.losses import LossMeans
from moshi_ttt.system.platforms import peak_memory
from moshi_ttt.training.step import Step

METRICS = "metrics.jsonl"


def memory_bytes(device: torch.device) -> int | None:
    """The peak memory of this process: allocated on a CUDA device, or resident on the CPU; None if unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return peak_memory()


def loss_record(losses: LossMeans) -> dict[str, float | int | None]:
    """Losses for a log: the total, and of each ``loss_NAME``, ``nats_NAME`` and ``perplexity_NAME``.

    A perplexity is the exponential of nats per token; null where there was no such token. Losses that are not in nats
    have ``mean_NAME``, their plain mean, instead of both.
    """
    record: dict[str, float | int | None] = {"loss": losses.total}
    record |= {f"loss_{name}": mean for name, mean in losses.means.items()}
    if losses.in_nats:
        record |= {f"nats_{name}": _finite(nats) for name, nats in losses.plain.items()}
        record |= {f"perplexity_{name}": _perplexity(nats) for name, nats in losses.plain.items()}
    else:
        record |= {f"mean_{name}": _finite(mean) for name, mean in losses.plain.items()}
    return {**record, "tokens": losses.terms}


def eval_line(record: Mapping[str, Any], losses: LossMeans) -> str:
    """An evaluation in one line, with the losses that there were tokens for."""
    parts = []
    for name, mean in losses.plain.items():
        if math.isnan(mean):  # there was no such token, as of text without transcripts
            continue
        perplexity = record.get(f"perplexity_{name}")
        more = "" if perplexity is None else f" (perplexity {perplexity:,.1f})"
        parts.append(f"{name} {mean:.4f}{' nats/token' if losses.in_nats else ''}{more}")
    return f"held out after step {record['step']}: {', '.join(parts) or 'nothing to predict'}, {losses.terms:,} tokens"


def step_record(step: Step, memory: int | None) -> dict[str, Any]:
    """One line of ``metrics.jsonl``; ``memory`` in bytes."""
    return {
        "kind": "train", "step": step.number, **loss_record(step.losses), "gradient_norm": _finite(step.gradient_norm),
        "skipped": step.skipped, "bad_segments": step.bad_segments, "learning_rates": dict(step.learning_rates),
        "seconds": step.seconds, "tokens_per_second": step.losses.terms / step.seconds, "memory_bytes": memory,
    }  # fmt: skip


def health_record(health: Mapping[Site, BlockHealth]) -> dict[str, Any]:
    """The figures and red flags of every block."""
    return {
        str(site): {**{name: _finite(value) for name, value in found.figures.items()}, "red_flags": found.red_flags}
        for site, found in health.items()
    }


class RunLog:
    """Where the lines of one run go; only the first rank has one.

    Args:
        run_dir: the folder of ``metrics.jsonl`` and TensorBoard's files.
        console: for lines that a person reads.
        total: steps of the whole run.
        start: steps made before; what the log has after them is dropped.
        run: of a run of ``moshi-ttt train``: whether curves go to TensorBoard and Weights & Biases too
            (``check_installed`` comes before).
    """

    def __init__(
        self, run_dir: Path, console: Console, *, total: int, start: int = 0, run: RunConfig | None = None
    ) -> None:
        self.console = console
        self.path = run_dir / METRICS
        _drop_after(self.path, start)
        self._file = self.path.open("a", encoding="utf-8")
        self._board = _tensorboard(run_dir) if run is not None and run.tensorboard else None
        self._wandb = _wandb(run.wandb, run_dir, run) if run is not None and run.wandb.project else None
        self._progress = Progress(
            TextColumn("training"), BarColumn(bar_width=20), MofNCompleteColumn(), TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"), console=console, disable=not console.is_terminal,
        )  # fmt: skip
        self._task = self._progress.add_task("", total=total, completed=start, note="")
        self._total, self._start, self._began = total, start, time.monotonic()

    def __enter__(self) -> RunLog:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()
        self._file.close()
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()

    def write(self, record: Mapping[str, Any]) -> None:
        """One record, everywhere: a line of JSON, and its numbers as curves."""
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        numbers = dict(_numbers(record))
        if self._board is not None:
            for name, value in numbers.items():
                self._board.add_scalar(name, value, record["step"])
        if self._wandb is not None:
            self._wandb.log(numbers, step=record["step"])

    def show(self, record: Mapping[str, Any]) -> None:
        """The record of a training step as the progress line; where there is no terminal, a line of its own."""
        note, step = summary(record), int(record["step"])
        self._progress.update(self._task, completed=step, note=note)
        if self._progress.disable:
            # From the time that steps took so far with all between them: evaluations, checkpoints.
            each = (time.monotonic() - self._began) / max(1, step - self._start)
            self.say(f"step {step}/{self._total}: {note}  {_duration(each * (self._total - step))} left")

    def say(self, text: str) -> None:
        """Print a line on the console."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)


def summary(record: Mapping[str, Any]) -> str:
    """A training step in one line."""
    losses = {key.removeprefix("loss_"): value for key, value in record.items() if key.startswith("loss_")}
    parts = [f"{name} {value:.3f}" for name, value in losses.items()]
    norm, rates = record["gradient_norm"], record["learning_rates"]
    parts.append(f"gradient norm {'not finite' if norm is None else f'{norm:.3g}'}")
    parts.append(f"lr {' '.join(f'{group} {rate:.2g}' for group, rate in rates.items())}")
    parts.append(f"{record['seconds']:.2f} s/step")
    parts.append(f"{record['tokens_per_second']:,.0f} tokens/s")
    if record["memory_bytes"] is not None:
        parts.append(f"{record['memory_bytes'] / 2**30:.1f} GiB")
    blocks = list(record.get("blocks", {}).values())
    gates = [block["gate"] for block in blocks if block.get("gate") is not None]
    gains = [
        block["inner_loss_before"] - block["inner_loss_after"]
        for block in blocks
        if block.get("inner_loss_before") is not None and block.get("inner_loss_after") is not None
    ]
    if gates:
        parts.append(f"gate {sum(gates) / len(gates):.3f}")
    if gains:
        parts.append(f"inner gain {sum(gains) / len(gains):.3g}")
    if any(block["red_flags"] for block in blocks):
        parts.append("a block has red flags")
    if record["skipped"]:
        parts.append("NOT FINITE, skipped")
    return "  ".join(parts)


def _duration(seconds: float) -> str:
    """``1:02:03`` or ``2:03``."""
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _drop_after(path: Path, step: int) -> None:
    """Leave out what a run that is resumed had logged after the checkpoint."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue  # a line that a kill cut short
        if record["step"] <= step:
            kept.append(line)
    with atomic_file(path) as temporary:
        temporary.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")


def _numbers(record: Mapping[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    found: list[tuple[str, float]] = []
    for name, value in record.items():
        if isinstance(value, Mapping):
            found += _numbers(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and not isinstance(value, bool) and name != "step":
            found.append((f"{prefix}{name}" if prefix else f"{record['kind']}/{name}", float(value)))
    return found


def _perplexity(nats: float) -> float | None:
    return _finite(math.exp(min(nats, 700.0))) if math.isfinite(nats) else None


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def check_installed(run: RunConfig) -> None:
    """Raise ConfigError when TensorBoard or wandb is asked for and not installed."""
    if run.tensorboard:
        try:
            import_module("torch.utils.tensorboard")
        except ImportError:
            raise ConfigError("tensorboard is true, and it is not installed: pip install tensorboard.") from None
    if run.wandb.project:
        try:
            import_module("wandb")
        except ImportError:
            raise ConfigError("wandb.project is set, and wandb is not installed: pip install wandb.") from None


def _tensorboard(run_dir: Path) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(run_dir / "tensorboard"))


def _wandb(config: WandbConfig, run_dir: Path, run: RunConfig) -> Any:
    import wandb

    if config.key:
        wandb.login(key=config.key)
    return wandb.init(
        project=config.project, name=config.run_name or run_dir.name, dir=str(run_dir),
        mode="offline" if config.offline else "online", config=run.model_dump(mode="json", exclude={"wandb": {"key"}}),
    )  # fmt: skip
