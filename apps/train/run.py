"""``moshi-ttt train``, from config to checkpoints: everything in order, each part in a module of its own."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from moshi_ttt.apps.train import export
from moshi_ttt.apps.train.checkpoint import STATE, CheckpointWriter, find_checkpoints, load
from moshi_ttt.apps.train.data.codec import SpeechCodec
from moshi_ttt.apps.train.data.corpus import Corpus, open_corpus
from moshi_ttt.apps.train.data.dataset import Batch, TrainingData, loader
from moshi_ttt.apps.train.data.manifest import DataError
from moshi_ttt.apps.train.evaluation import evaluation_batches
from moshi_ttt.apps.train.logs import RunLog, health_record, loss_record, memory_bytes, step_record
from moshi_ttt.apps.train.model import TrainedModel, build
from moshi_ttt.apps.train.optimisation import current_rates
from moshi_ttt.apps.train.planning import group_plans, groups_table
from moshi_ttt.apps.train.runtime import Runtime, start
from moshi_ttt.apps.train.settings import Settings, write_settings
from moshi_ttt.apps.train.stopping import StopRequest
from moshi_ttt.apps.train.trainer import Losses, Step, Trainer, some_of
from moshi_ttt.core.errors import ConfigError
from moshi_ttt.core.health import HealthMonitor
from moshi_ttt.core.registry import Registry

CHECKED_STEP = 2
ARGS = "args.yaml"
"""The settings of a run, in its folder: what tells that the folder is a run's."""


@dataclass
class Outcome:
    """How a run ended.

    Attributes:
        step: the last step made.
        stopped: a signal asked it to end before ``max_steps``.
        losses: the evaluation losses by step.
        checkpoint: the newest checkpoint.
    """

    step: int
    stopped: bool
    losses: dict[int, Losses] = field(default_factory=dict)
    checkpoint: Path | None = None


def run(settings: Settings, registry: Registry, console: Console) -> Outcome:
    """Train to the end, or until a signal asks to stop. Raises a MoshiTTTError; every rank calls this."""
    export.check(settings)
    with start(settings.run.device, settings.run.shard_size) as runtime:
        resumed = check_run_dir(settings, runtime)
        return _train(settings, registry, runtime, console, resumed)


def check_run_dir(settings: Settings, runtime: Runtime) -> Path | None:
    """The checkpoint to go on from, if there is one; nothing is written yet.

    Raises ConfigError when the run's folder is in use and nothing says what to do with it.
    """
    found: Path | str | None = None
    if runtime.first:
        try:
            found = _check_run_dir(settings)
        except ConfigError as error:
            found = str(error)
    found = runtime.agree(found)
    if isinstance(found, str):
        raise ConfigError(found)
    return found


def _check_run_dir(settings: Settings) -> Path | None:
    run = settings.run
    folder = Path(run.run_dir)
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"run_dir: {folder} exists and is not a folder. Choose another.")
    used = _in_use(folder)
    if used and not (folder / ARGS).is_file():
        raise ConfigError(f"run_dir: {folder} is not empty, and no run made it. Choose another, or empty it yourself.")
    if isinstance(run.resume, str):
        if not (Path(run.resume) / STATE).is_file():
            raise ConfigError(f"resume: {run.resume} is no complete checkpoint: it has no {STATE}.")
        return Path(run.resume)
    if run.resume:
        return next(reversed(find_checkpoints(folder)), None)
    if used and not run.overwrite_run_dir:
        raise ConfigError(
            f"run_dir: {folder} holds an earlier run. Set resume: true to go on with it, overwrite_run_dir: true to "
            "delete it, or choose another folder."
        )
    return None


def _open_run_dir(settings: Settings) -> None:
    """Make the run's folder, in place of an earlier run's where the config says so."""
    run = settings.run
    folder = Path(run.run_dir)
    if _in_use(folder) and run.overwrite_run_dir and not run.resume:
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_settings(settings, folder / ARGS)


def _in_use(folder: Path) -> bool:
    return folder.is_dir() and any(folder.iterdir())


def _train(settings: Settings, registry: Registry, runtime: Runtime, console: Console, resumed: Path | None) -> Outcome:
    run = settings.run
    trained = build(settings, registry, runtime.mesh, runtime.device)
    codec = _codec(settings, trained, runtime)
    corpus = _corpus(settings, codec, run.data.train_data)
    held_out = _corpus(settings, codec, run.data.eval_data) if run.do_eval else None
    trainer = Trainer(trained, run, runtime)
    position = _position(settings, trainer)
    if resumed is not None:
        load(trainer, resumed, position)
    data = TrainingData(
        corpus, batch_size=run.batch_size, microbatches=run.num_microbatches, rank=runtime.rank,
        world_size=runtime.world_size, seed=run.seed, shuffle=run.data.shuffle, carry=run.carry_state,
    )  # fmt: skip
    batches = iter(loader(data, start_step=trainer.step, num_workers=run.data.num_workers))
    outcome = Outcome(step=trainer.step, stopped=False, checkpoint=resumed)
    if runtime.first:
        _open_run_dir(settings)
    with ExitStack() as stack:
        stop = stack.enter_context(StopRequest())
        log = stack.enter_context(RunLog(Path(run.run_dir), run, console, trainer.step)) if runtime.first else None
        writer = CheckpointWriter(Path(run.run_dir), runtime, run.num_ckpt_keep) if run.do_ckpt else None
        if writer is not None:
            stack.callback(writer.close)
        if log is not None:
            for line in _introduction(settings, trainer, corpus, held_out, resumed):
                log.say(line) if isinstance(line, str) else console.print(line)
        loop = _Loop(settings, trainer, runtime, held_out, log, writer, position, outcome)
        while trainer.step < run.max_steps and not outcome.stopped:
            loop.advance(batches, stop, segments=corpus.num_segments)
        if writer is not None:
            outcome.checkpoint = writer.finish() or outcome.checkpoint
        if log is not None:
            log.say(_conclusion(outcome, run.max_steps))
    return outcome


@dataclass
class _Loop:
    """What happens around each step."""

    settings: Settings
    trainer: Trainer
    runtime: Runtime
    held_out: Corpus | None
    log: RunLog | None
    writer: CheckpointWriter | None
    position: dict[str, Any]
    outcome: Outcome
    bad_segments: int = 0

    def advance(self, batches: Iterator[Batch], stop: StopRequest, *, segments: int) -> None:
        """One step, and what is due after it: a log line, an evaluation, a checkpoint."""
        run, trainer = self.settings.run, self.trainer
        number = trainer.step + 1
        logged = number % run.log_freq == 0 or number == run.max_steps
        blocks = trainer.trained.injection.blocks
        monitor = HealthMonitor(blocks) if logged and run.log_health and blocks else None
        began = time.perf_counter()
        # Data first: what it takes counts, and a signal that arrives meanwhile still ends the run after this step.
        mine = [next(batches) for _ in range(run.num_microbatches)]
        with monitor or nullcontext():
            step = trainer.make_step(mine, stop=stop.asked, ready=self.writer is not None and self.writer.ready)
        if self.runtime.device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - began
        self.outcome.step, self.outcome.stopped = step.number, step.stop
        if step.ready and self.writer is not None:
            self.outcome.checkpoint = self.writer.commit() or self.outcome.checkpoint
        self._report_problems(step, segments)
        if step.number == CHECKED_STEP and not step.skipped:
            self._report_idle()
        if self.log is not None and (logged or step.skipped):
            record = step_record(step, current_rates(trainer.optimizer), seconds, memory_bytes(self.runtime.device))
            if monitor is not None:
                record["blocks"] = health_record(monitor.read())
            self.log.write(record)
            self.log.show(record)
        last = step.number >= run.max_steps or step.stop
        if self.held_out is not None and (_due(step.number, run.eval_freq) or (last and not step.stop)):
            self._evaluate(self.held_out, step.number)
        if self.writer is not None and (_due(step.number, run.ckpt_freq) or last):
            write = export.prepare(trainer.trained, self.settings, step.number)
            self.writer.save(trainer, position=self.position, export=write)

    def _evaluate(self, held_out: Corpus, number: int) -> None:
        runtime, size = self.runtime, self.settings.run.batch_size
        parts = evaluation_batches(held_out, batch_size=size, rank=runtime.rank, world_size=runtime.world_size)
        losses = self.trainer.evaluate(parts)
        self.outcome.losses[number] = losses
        if self.log is not None:
            record = {"kind": "eval", "step": number, **loss_record(losses)}
            self.log.write(record)
            self.log.say(
                f"held out after step {number}: audio {losses.audio_nats:.4f} nats a token (perplexity "
                f"{record['perplexity_audio']:,.1f}), text {losses.text_nats:.4f} nats, {losses.tokens:,} tokens"
            )

    def _report_idle(self) -> None:
        """Say which trained parameters learn nothing: by the second step all that can have a gradient have one."""
        idle = self.trainer.without_gradient()
        if idle and self.log is not None:
            self.log.say(
                f"Warning: {len(idle)} trained tensors got no gradient in step {CHECKED_STEP}: {some_of(idle)}. "
                "Is a segment longer than a block's chunk, and is there text to predict?"
            )

    def _report_problems(self, step: Step, segments: int) -> None:
        """Say what could not be read, and stop when it is more than the config allows."""
        for problem in step.problems:
            print(f"Warning: skipped: {problem}", flush=True)
        self.bad_segments += step.bad_segments
        allowed = self.settings.run.data.max_bad_share
        if self.bad_segments > allowed * max(segments, step.number * self.trainer.rows):
            raise DataError(
                f"{self.bad_segments} segments could not be read by step {step.number}, which is more than "
                f"data.max_bad_share = {allowed} allows. Mend the recordings named above, or raise it."
            )


def _due(number: int, every: int) -> bool:
    return every > 0 and number % every == 0


def _codec(settings: Settings, trained: TrainedModel, runtime: Runtime) -> SpeechCodec:
    bundle = settings.host.bundle()
    # Workers are forked, and a forked process cannot use the GPU.
    device = "cpu" if settings.run.data.num_workers else runtime.device
    return SpeechCodec.of(trained.model, bundle.load_mimi(device), bundle.tokenizer())


def _corpus(settings: Settings, codec: SpeechCodec, text: str) -> Corpus:
    data = settings.run.data
    frames = codec.frames_of(settings.run.duration_sec)
    return open_corpus(
        text, codec, frames=frames, transcripts=data.transcripts, max_bad_share=data.max_bad_share
    )  # fmt: skip


def _position(settings: Settings, trainer: Trainer) -> dict[str, Any]:
    """What decides which rows a step sees, and what made the checkpoint."""
    run = settings.run
    return {
        "rows": trainer.rows,
        "seed": run.seed,
        "data": {"train_data": run.data.train_data, "shuffle": run.data.shuffle, "transcripts": run.data.transcripts},
        "duration_sec": run.duration_sec,
        "carry_state": run.carry_state,
        "ranks": trainer.runtime.world_size,
        "versions": {name: version(name) for name in ("moshi-ttt", "torch", "moshi")},
    }


def _introduction(
    settings: Settings, trainer: Trainer, corpus: Corpus, held_out: Corpus | None, resumed: Path | None
) -> Iterator[str | Table]:
    run, runtime = settings.run, trainer.runtime
    blocks = trainer.trained.injection.plan.blocks
    where = ", ".join(f"{block.site} ({block.variant.name})" for block in blocks) or "none"
    yield f"{settings.host.hf_repo}; blocks: {where}; {runtime.world_size} rank(s) on {runtime.device.type}"
    yield groups_table(group_plans(trainer.trained, settings))
    for name, each in (("train", corpus), ("held out", held_out)):
        if each is not None:
            recordings = sum(len(source.recordings) for source in each.sources)
            yield f"{name}: {recordings:,} recordings, {each.seconds / 60:,.1f} min, {each.num_segments:,} segments"
            yield from (f"Warning: left out: {problem}" for problem in each.problems)
    yield (
        f"{run.max_steps} steps of {trainer.rows} segments of {run.duration_sec:g} s, "
        f"{'memory carried along recordings' if run.carry_state else 'each segment on its own'}; {run.run_dir}"
    )
    if resumed is not None:
        yield f"going on from {resumed}"


def _conclusion(outcome: Outcome, max_steps: int) -> str:
    saved = f"checkpoint: {outcome.checkpoint}" if outcome.checkpoint else "nothing was saved (do_ckpt: false)"
    if outcome.stopped:
        return f"Stopped as asked after step {outcome.step} of {max_steps}; {saved}. Go on with resume=true."
    return f"Done: {outcome.step} steps; {saved}."
