"""``moshi-ttt train`` from config to checkpoints: the parts in their order, each in a module of its own."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from moshi_ttt.configs.settings import Settings
from moshi_ttt.configs.training import RunConfig
from moshi_ttt.core.adapter import find_adapter, major_version
from moshi_ttt.core.batches import Batch
from moshi_ttt.core.injection import PlannedBlock
from moshi_ttt.core.registry import Registry, default_registry
from moshi_ttt.data.codec import SpeechCodec
from moshi_ttt.data.corpus import Corpus, open_corpus
from moshi_ttt.data.dataset import TrainingData, loader
from moshi_ttt.data.held_out import held_out_batches
from moshi_ttt.hosts.moshi.compatibility import require_trainable
from moshi_ttt.hosts.moshi.host import MOSHI_HOST
from moshi_ttt.system import platforms, threads
from moshi_ttt.system.interruption import StopRequest
from moshi_ttt.training import export
from moshi_ttt.training.callback import Callback
from moshi_ttt.training.callbacks import BadData, GraceWarnings, Health, IdleParameters, Logging
from moshi_ttt.training.checkpoint import CheckpointWriter, load, num_bytes, read_state
from moshi_ttt.training.determinism import deterministic
from moshi_ttt.training.inner_losses import InnerLosses
from moshi_ttt.training.logs import METRICS, RunLog, check_installed
from moshi_ttt.training.model import build, continued_lora
from moshi_ttt.training.plan_tables import groups_table
from moshi_ttt.training.planning import group_plans, low_rates
from moshi_ttt.training.run_dir import RunDir, hold_run_dir
from moshi_ttt.training.runtime import Runtime, device_kind, start
from moshi_ttt.training.saving import Checkpoints
from moshi_ttt.training.step import Outcome
from moshi_ttt.training.stopping import Pace, SafePoints, launcher_warnings
from moshi_ttt.training.trainer import Trainer
from moshi_ttt.training.validation import Validation

NOT_COMPARED = {
    "run_dir", "overwrite_run_dir", "resume", "moshi_paths", "adapter", "wandb", "threads", "stop_grace_sec",
}  # fmt: skip
"""Options that say where a run is written and what it starts from: a run that is resumed may change them freely."""


def run(
    settings: Settings, registry: Registry | None = None, console: Console | None = None,
    stop: StopRequest | None = None,
) -> Outcome:  # fmt: skip
    """Train to the end, or until a signal asks to stop. Every rank calls this.

    Args:
        settings: the run: ``configs.settings.read_settings`` reads them from a config.
        registry: where hosts, variants and policies are looked up; the process's registry by default.
        console: where the first rank prints; one on standard output by default.
        stop: what the signals ask; left out, it is made here. Until it is ``started`` there is nothing to save, and an
            interruption ends the run at once.

    Raises a MoshiTTTError.
    """
    registry, console = registry or default_registry(), console or Console()
    export.check(settings)
    check_installed(settings.run)
    platforms.check_workers(settings.run.data.num_workers)
    with ExitStack() as stack:
        stop = stop or stack.enter_context(StopRequest())
        stack.enter_context(deterministic(settings.run.deterministic, device_kind(settings.run.device)))
        runtime = stack.enter_context(start(settings.run.device, settings.run.shard_size))
        folder = stack.enter_context(hold_run_dir(settings, runtime))
        skeleton = MOSHI_HOST.skeleton(settings.host)
        codec = _codec(settings, runtime, skeleton)
        size, workers = threads.largest(skeleton, codec.mimi), settings.run.data.num_workers
        stack.enter_context(threads.computing(size, settings.run.threads, workers=workers))
        return _train(settings, registry, runtime, console, codec, folder, stop)


def _train(
    settings: Settings, registry: Registry, runtime: Runtime, console: Console, codec: SpeechCodec, folder: RunDir,
    stop: StopRequest,
) -> Outcome:  # fmt: skip
    run, resumed = settings.run, folder.resumed
    continued_lora(settings, settings.host.bundle())
    # The data first: what is wrong with it should not wait for the weights.
    corpus = _corpus(settings, codec, run.data.train_data)
    held_out = _corpus(settings, codec, run.data.eval_data or "") if run.do_eval else None
    trained = build(settings, runtime.mesh, runtime.device, registry=registry, resumed=resumed is not None)
    trainer = Trainer(trained, run, runtime)
    position = _position(settings, trainer, corpus)
    state = read_state(resumed) if resumed is not None else {}
    if resumed is not None:
        load(trainer, resumed, position)
    data = TrainingData(
        corpus, batch_size=run.batch_size, microbatches=run.num_microbatches, rank=runtime.rank,
        world_size=runtime.world_size, seed=run.seed, shuffle=run.data.shuffle, carry=run.carry_state,
    )  # fmt: skip
    safe = SafePoints(stop, runtime, Pace.expecting(num_bytes(trainer)), run.stop_grace_sec)
    stop.start(safe.asked_anywhere)
    batches = iter(loader(data, start_step=trainer.step, num_workers=run.data.num_workers))
    trainer.outcome.step, trainer.outcome.checkpoint = trainer.step, resumed
    bad = BadData(corpus.num_segments, run.data.max_bad_share, int(state.get("bad_segments", 0)))
    with ExitStack() as stack:
        if runtime.first:
            stack.enter_context(folder.opened(trainer.outcome))
        log = stack.enter_context(_log(run, console, trainer.step)) if runtime.first else None
        callbacks: list[Callback] = [bad, IdleParameters(log)]
        if log is not None:
            callbacks += _logging(settings, trainer, log)
        if run.do_ckpt:
            callbacks.append(checkpoints := _checkpoints(settings, trainer, position, bad))
            stack.callback(checkpoints.writer.close)
        if held_out is not None:
            missing = folder.same and not _evaluated(folder, runtime, trainer.step)
            callbacks.append(_validation(trainer, run, held_out, bad, log, missing=missing))
        if log is not None:
            for line in _introduction(settings, trainer, corpus, held_out, resumed, state):
                log.say(line) if isinstance(line, str) else console.print(line)
        outcome = trainer.fit(batches, callbacks, safe=safe)
        if log is not None:
            log.say(_conclusion(outcome, run))
            if outcome.checkpoint is not None and export.lacks_blocks(settings):
                log.say(export.WITHOUT_BLOCKS)
    return outcome


def _log(run: RunConfig, console: Console, start: int) -> RunLog:
    return RunLog(Path(run.run_dir), console, total=run.max_steps, start=start, run=run)


def _logging(settings: Settings, trainer: Trainer, log: RunLog) -> Iterator[Callback]:
    """What the rank that logs adds, in the order in which it is written."""
    run, injection = settings.run, trainer.trained.injection
    if run.log_health:
        yield Health(log, run.health_freq)
    yield Logging(log, run.log_freq)
    yield InnerLosses(run.inner_losses, Path(run.run_dir), injection, log)
    if run.do_ckpt:
        yield GraceWarnings(log, run.stop_grace_sec)


def _checkpoints(settings: Settings, trainer: Trainer, position: dict[str, Any], bad: BadData) -> Checkpoints:
    run = settings.run
    return Checkpoints(
        CheckpointWriter(Path(run.run_dir), trainer.runtime, run.num_ckpt_keep, trainer.step), run.ckpt_freq,
        position=lambda: {**position, "bad_segments": bad.bad},
        export=lambda step: export.prepare(trainer.trained, settings, step),
    )  # fmt: skip


def _validation(
    trainer: Trainer, run: RunConfig, held_out: Corpus, bad: BadData, log: RunLog | None, *, missing: bool
) -> Validation:
    rank, world = trainer.runtime.rank, trainer.runtime.world_size

    def documents() -> Iterable[Iterable[Batch]]:
        return held_out_batches(held_out, batch_size=run.batch_size, rank=rank, world_size=world)

    return Validation(documents, held_out.num_segments, run.eval_freq, bad, log, missing)


def _evaluated(folder: RunDir, runtime: Runtime, step: int) -> bool:
    """Whether the log has an evaluation after this step; equal on every rank."""
    found = False
    if runtime.first:
        lines = (folder.folder / METRICS).read_text(encoding="utf-8").splitlines()
        found = any((record := json.loads(line))["kind"] == "eval" and record["step"] == step for line in lines)
    return runtime.agree(found)


def _codec(settings: Settings, runtime: Runtime, skeleton: Any) -> SpeechCodec:
    # Workers are forked, and a forked process cannot use the GPU.
    device = "cpu" if settings.run.data.num_workers else runtime.device
    data = settings.run.data
    return SpeechCodec.load(
        settings.host, device, require=require_trainable, model=skeleton, moshi_channel=data.moshi_channel,
        speaker_label=data.speaker_label,
    )  # fmt: skip


def _corpus(settings: Settings, codec: SpeechCodec, text: str) -> Corpus:
    data = settings.run.data
    frames = codec.frames_of(settings.run.duration_sec)
    return open_corpus(
        text, codec, frames=frames, transcripts=data.transcripts, max_bad_share=data.max_bad_share
    )  # fmt: skip


def _position(settings: Settings, trainer: Trainer, corpus: Corpus) -> dict[str, Any]:
    """What a checkpoint says of the run that made it, and what another run must share to resume from it."""
    run, ttt = settings.run, settings.ttt
    return {
        "rows": trainer.rows,
        "seed": run.seed,
        "data": {
            "recordings": corpus.digest,
            "shuffle": run.data.shuffle,
            "transcripts": run.data.transcripts,
            "speaker_label": run.data.speaker_label,
            "moshi_channel": run.data.moshi_channel,
        },
        "duration_sec": run.duration_sec,
        "carry_state": run.carry_state,
        "base": trainer.trained.injection.host.fingerprint(trainer.trained.model)["weights"],
        "precision": ttt.precision,
        "ttt": [entry.model_dump(mode="json") for entry in ttt.ttt],
        "variants": {block.config.qualified_name: _maker(block) for block in trainer.trained.injection.plan.blocks},
        "lora": run.lora.model_dump(mode="json"),
        "full_finetuning": run.full_finetuning,
        "param_dtype": run.param_dtype,
        "inner_lr_warmup": run.inner_lr_warmup,
        "training": run.model_dump(mode="json", exclude=NOT_COMPARED),
        "ranks": trainer.runtime.world_size,
        "threads": torch.get_num_threads(),
        "versions": {name: version(name) for name in ("moshi-ttt", "torch", "moshi")},
    }


def _maker(block: PlannedBlock) -> str:
    """The distribution that provides a block's variant, and its major version: another may compute something else."""
    made = block.variant.provenance
    return f"{made.distribution} {major_version(made.version)}"


def _introduction(
    settings: Settings, trainer: Trainer, corpus: Corpus, held_out: Corpus | None, resumed: Path | None, state: Any
) -> Iterator[str | Table]:
    run, runtime = settings.run, trainer.runtime
    blocks = trainer.trained.injection.plan.blocks
    where = ", ".join(f"{block.site} ({block.variant.name})" for block in blocks) or "none"
    ranks = f"{runtime.world_size} rank(s) on {runtime.device.type}, {torch.get_num_threads()} thread(s) each"
    yield f"{settings.host.hf_repo}; blocks: {where}; {ranks}"
    yield groups_table(group_plans(trainer.trained, settings))
    yield from (f"Warning: {problem}" for problem in low_rates(trainer.trained, settings))
    if run.adapter is not None and resumed is None:
        yield f"starting from the values of {find_adapter(run.adapter)}"
        yield from (f"Warning: {note}" for note in trainer.trained.notes)
    if (stored := settings.host.bundle().lora) is not None:
        yield f"the LoRA in {stored.path} is {'trained further' if run.lora.enable else 'merged into the base weights'}"
    for name, each in (("train", corpus), ("held out", held_out)):
        if each is not None:
            recordings = sum(len(source.recordings) for source in each.sources)
            yield f"{name}: {recordings:,} recordings, {each.seconds / 60:,.1f} min, {each.num_segments:,} segments"
            if each.words is not None:
                yield f"{name}: {each.words}"
            yield from (f"Warning: left out: {problem}" for problem in each.problems)
            yield from (f"Warning: {note}" for note in each.notes)
    yield from (f"Warning: {note}" for note in launcher_warnings(run.stop_grace_sec))
    yield (
        f"{run.max_steps} steps of {trainer.rows} segments of {run.duration_sec:g} s, "
        f"{'memory carried along recordings' if run.carry_state else 'each segment on its own'}; {run.run_dir}"
    )
    if resumed is not None:
        yield f"resuming from {resumed}, after step {trainer.step}"
        now = _position(settings, trainer, corpus)
        changed = list(_changes(_free_to_change(state), _free_to_change(now)))
        if changed:
            yield f"Warning: changed since: {'; '.join(changed)}"


def _free_to_change(position: Any) -> dict[str, Any]:
    """What a run that is resumed may have otherwise than the checkpoint, and is told about."""
    counts = {key: position[key] for key in ("ranks", "threads") if key in position}
    return {**position.get("training", {}), **counts, **position.get("versions", {})}


def _changes(old: Any, new: Any, name: str = "") -> Iterator[str]:
    """What differs between two plain values, by the dotted names of options; those that ``old`` did not have apart."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in old:
            yield from _changes(old.get(key), new.get(key), f"{name}.{key}" if name else key)
    elif old != new:
        yield f"{name} from {old!r} to {new!r}"


def _conclusion(outcome: Outcome, run: RunConfig) -> str:
    saved = f"checkpoint: {outcome.checkpoint}" if outcome.checkpoint else "nothing was saved (do_ckpt: false)"
    if not outcome.stopped:
        return f"Done: {outcome.step} steps; {saved}."
    if outcome.step == 0:
        return "Stopped on request before the first step; there was nothing to save."
    further = " Resume with resume=true." if outcome.checkpoint else ""
    if outcome.step >= run.max_steps:
        return f"Stopped on request after the last step, before its evaluation; {saved}.{further}"
    return f"Stopped on request after step {outcome.step} of {run.max_steps}; {saved}.{further}"
