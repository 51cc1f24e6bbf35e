"""What happens around each step: log lines, evaluations, checkpoints, complaints about the data."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from moshi_ttt.configs.settings import Settings
from moshi_ttt.core.block import Site
from moshi_ttt.core.health import BlockHealth, HealthMonitor
from moshi_ttt.data.corpus import Corpus
from moshi_ttt.data.dataset import Batch
from moshi_ttt.training import export
from moshi_ttt.training.checkpoint import CheckpointWriter
from moshi_ttt.training.inner_losses import InnerLosses
from moshi_ttt.training.logs import RunLog, health_record, loss_record, memory_bytes, step_record
from moshi_ttt.training.runtime import Runtime
from moshi_ttt.training.stopping import SafePoints, StepGivenUpError
from moshi_ttt.training.trainer import Losses, Step, Trainer, TrainingError, some_of
from moshi_ttt.training.validation import evaluation_batches

CHECKED_STEPS = 2
"""Steps by which every trained parameter should have had a gradient."""


@dataclass
class Outcome:
    """How a run ended.

    Attributes:
        step: the last step made.
        stopped: a signal asked it to end before the last step and its evaluation.
        losses: the evaluation losses by step.
        checkpoint: the newest checkpoint.
    """

    step: int
    stopped: bool
    losses: dict[int, Losses] = field(default_factory=dict)
    checkpoint: Path | None = None


@dataclass
class Loop:
    """What happens around each step."""

    settings: Settings
    trainer: Trainer
    runtime: Runtime
    held_out: Corpus | None
    log: RunLog | None
    writer: CheckpointWriter | None
    position: dict[str, Any]
    outcome: Outcome
    safe: SafePoints
    bad_segments: int = 0
    idle: set[str] = field(default_factory=set)
    told: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.inner_losses = InnerLosses(self.settings.run, self.trainer.trained.injection)

    def advance(self, batches: Iterator[Batch], *, segments: int) -> None:
        """One step, and what is due after it: a log line, an evaluation, a checkpoint."""
        run, trainer = self.settings.run, self.trainer
        number = trainer.step + 1
        logged = number % run.log_freq == 0 or number == run.max_steps
        monitor = self._monitor(number)
        began = time.perf_counter()
        self.safe.began = time.monotonic()
        mine = self._read(batches)
        ready = self.writer is not None and self.writer.ready
        inner = self.inner_losses if self.log is not None and self.inner_losses.due(number) else None
        try:
            with monitor or nullcontext(), inner.measuring(mine[0].codes.shape[-1] + 1) if inner else nullcontext():
                step = trainer.make_step(mine, safe=self.safe, ready=ready)
        except StepGivenUpError:
            self._stop()
            return
        if self.runtime.device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - began
        self.safe.pace.steps.append(seconds)
        self.outcome.step = step.number
        if step.ready and self.writer is not None:
            self._committed(self.writer.commit())
        self._report_problems(step, segments)
        if step.number <= CHECKED_STEPS and not step.skipped:
            self._look_for_idle(step.number)
        if self.log is not None and (logged or step.skipped or monitor is not None):
            record = step_record(step, seconds, memory_bytes(self.runtime.device))
            health = {} if monitor is None else monitor.read()
            if health:
                record["blocks"] = health_record(health)
            self.log.write(record)
            self.log.show(record)
            self._warn_of_red_flags(health)
        if inner is not None and self.log is not None and inner.sites:
            self.log.write(inner.record(step.number))
            if (problem := inner.plot(step.number)) is not None:
                self.log.say(f"Warning: {problem}")
        self._warn_of_grace()
        self._end_step(step)

    def _monitor(self, number: int) -> HealthMonitor | None:
        """What measures the blocks in this step, on the rank that writes the log; None where none is due."""
        run, blocks = self.settings.run, self.trainer.trained.injection.blocks
        early = number < run.health_freq and number & (number - 1) == 0  # 1, 2, 4, 8, ...
        due = early or number % run.health_freq == 0 or number == run.max_steps
        if self.log is None or not (run.log_health and blocks and due):
            return None
        return HealthMonitor(blocks, sample=True)

    def _warn_of_red_flags(self, health: Mapping[Site, BlockHealth]) -> None:
        """Say once of each block that something is wrong with it; the log has every measurement."""
        for site, found in health.items():
            if found.red_flags and self.log is not None and f"health of {site}" not in self.told:
                self.told.add(f"health of {site}")
                self.log.say(f"Warning: the block at {site} is not healthy: {' '.join(found.red_flags)}")

    def _read(self, batches: Iterator[Batch]) -> list[Batch]:
        """This rank's micro-batches of a step; what is left is not read once the rank has been asked to stop."""
        mine: list[Batch] = []
        while len(mine) < self.settings.run.num_microbatches and not self.safe.request.asked:
            mine.append(next(batches))
        return mine

    def _end_step(self, step: Step) -> None:
        """Save and evaluate where that is due; every rank has the same ``step.stop``."""
        last = step.number >= self.settings.run.max_steps
        if step.stop and not last:
            self._stop()
            return
        if last or _due(step.number, self.settings.run.ckpt_freq):
            self._save()
        if self.evaluation_due(step.number):
            self.evaluate(step.number)

    def evaluation_due(self, number: int) -> bool:
        """Whether there is an evaluation after this step."""
        run = self.settings.run
        return self.held_out is not None and (_due(number, run.eval_freq) or number >= run.max_steps)

    def _stop(self) -> None:
        """End here, with a checkpoint unless this run has one of this step, or has made no step at all."""
        self.outcome.stopped = True
        if self.trainer.step > 0:
            self._save()

    def _save(self) -> None:
        if self.writer is None or self.writer.has(self.trainer.step):
            return
        self.finish()  # an earlier checkpoint first
        began = time.monotonic()
        write = export.prepare(self.trainer.trained, self.settings, self.trainer.step)
        position = {**self.position, "bad_segments": self.bad_segments}
        self.writer.save(self.trainer, position=position, export=write, began=began)

    def finish(self) -> None:
        """Wait for the checkpoint that is being written, if there is one; every rank calls this."""
        if self.writer is not None:
            self._committed(self.writer.finish())

    def _committed(self, folder: Path | None) -> None:
        if folder is not None and self.writer is not None:
            self.outcome.checkpoint = folder
            self.safe.pace.saved(self.writer.seconds)

    def _warn_of_grace(self) -> None:
        run = self.settings.run
        for kind, warning in self.safe.pace.warnings(run.stop_grace_sec, run.num_microbatches).items():
            if self.log is not None and self.writer is not None and kind not in self.told:
                self.told.add(kind)
                self.log.say(warning)

    def evaluate(self, number: int) -> None:
        """Losses on the held-out recordings. When a stop comes first, they are made when the run is resumed."""
        assert self.held_out is not None
        runtime, size = self.runtime, self.settings.run.batch_size
        parts = evaluation_batches(self.held_out, batch_size=size, rank=runtime.rank, world_size=runtime.world_size)
        losses, problems = self.trainer.evaluate(parts, safe=self.safe)
        self._warn(problems)
        bad = int(runtime.sum(torch.tensor([float(len(problems))])))
        self._check_share(bad, self.held_out.num_segments, f"held-out segments could not be read after step {number}")
        if losses is None:
            self._stop()
            return
        self.outcome.losses[number] = losses
        if self.log is not None:
            record = {"kind": "eval", "step": number, **loss_record(losses), "bad_segments": bad}
            self.log.write(record)
            self.log.say(
                f"held out after step {number}: audio {losses.audio_nats:.4f} nats a token (perplexity "
                f"{record['perplexity_audio']:,.1f}), text {losses.text_nats:.4f} nats, {losses.tokens:,} tokens"
            )

    def _look_for_idle(self, number: int) -> None:
        """Say which trained parameters learn nothing: in one of the first steps all that can have a gradient have one.

        In the first, what LoRA and in-place TTT multiply by zero has none; later, with carried memory, what memory
        starts from.
        """
        idle = self.trainer.without_gradient()
        self.idle = idle if number == 1 else self.idle & idle
        if number == CHECKED_STEPS and self.idle and self.log is not None:
            self.log.say(
                f"Warning: {len(self.idle)} trained tensors got no gradient in the first {number} steps: "
                f"{some_of(sorted(self.idle))}. Is a segment longer than a block's chunk, and is there text to predict?"
            )

    def _report_problems(self, step: Step, segments: int) -> None:
        """Say what could not be read, and stop when it is more than the config allows."""
        self._warn(step.problems)
        self.bad_segments += step.bad_segments
        drawn = max(segments, step.number * self.trainer.rows)
        self._check_share(self.bad_segments, drawn, f"segments could not be read by step {step.number}")

    def _warn(self, problems: Sequence[str]) -> None:
        for problem in problems:
            if problem not in self.told:
                self.told.add(problem)
                print(f"Warning: skipped: {problem}", flush=True)

    def _check_share(self, bad: int, all_of_them: int, what: str) -> None:
        allowed = self.settings.run.data.max_bad_share
        if bad > allowed * all_of_them:
            raise TrainingError(
                f"{bad} {what}, which is more than data.max_bad_share = {allowed} allows. Mend the recordings named "
                "above, or raise it."
            )


def _due(number: int, every: int) -> bool:
    return every > 0 and number % every == 0
