"""``moshi-ttt quickstart`` from config to report: the parts in their order, each in a module of its own."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor

from moshi_ttt.apps.quickstart import evaluate as evaluating
from moshi_ttt.apps.quickstart import plots, recall, report, summary
from moshi_ttt.apps.quickstart.evaluate import Curve
from moshi_ttt.apps.quickstart.results import QuickstartResults
from moshi_ttt.apps.quickstart.setup import Request, Setup, prepare, read_settings
from moshi_ttt.apps.quickstart.stream import compare_with_training, loss_with_memory_cleared, stream_recording
from moshi_ttt.apps.quickstart.train import SpeechSegments, train
from moshi_ttt.core.adapter import save_adapter
from moshi_ttt.core.injection import Injection
from moshi_ttt.data.audio import decode, write_wav
from moshi_ttt.hosts.moshi.host import MOSHI_HOST
from moshi_ttt.system import threads
from moshi_ttt.system.output_folder import check_free, new_folder

MADE_BY = "moshi-ttt quickstart"
COMPARED_FRAMES = 150
"""Frames over which streaming is compared with training."""


def run(request: Request, console: Console) -> Path:
    """Run the quickstart and return the folder. Raises MoshiTTTError; the folder is then unchanged.

    Every input is checked before training starts.
    """
    started = time.perf_counter()
    check_free(request.out, made_by=MADE_BY, overwrite=request.overwrite)
    settings = read_settings(request)
    computing = threads.computing(threads.largest(MOSHI_HOST.skeleton(settings.host)), request.threads)
    with computing, new_folder(request.out, made_by=MADE_BY, overwrite=request.overwrite) as folder:
        setup = prepare(settings, request.audio)
        seconds = {"prepare": time.perf_counter() - started}
        console.print(summary.introduction(setup))
        results = measure(setup, folder, console, seconds)
        seconds["total"] = time.perf_counter() - started
        report.write(folder, setup, results, seconds, made_by=MADE_BY)
        files = sorted(path.name + "/" * path.is_dir() for path in folder.iterdir())
    console.print(summary.conclusion(request.out, files, setup, results, seconds["total"]))
    return request.out


def measure(setup: Setup, folder: Path, console: Console, seconds: dict[str, float]) -> QuickstartResults:
    """Train, evaluate and stream; writes the adapter, the generated audio and the plots into ``folder``."""
    model, host, settings, codec = setup.model, setup.plan.host, setup.settings, setup.codec
    document = codec.document([setup.speech.held_out])
    frame_seconds = 1 / codec.mimi.frame_rate

    def evaluate(name: str, *, updates: bool = True) -> Curve:
        with _timed(seconds, "evaluate"):
            return evaluating.evaluate(model, host, document, name=name, updates=updates)

    base = evaluate("base model")
    twice, memory = None, recall.shipped_memory(settings.host)
    if memory is not None:
        with _timed(seconds, "present twice"):
            twice = recall.present_twice(model, document, memory)
    injection: Injection = setup.plan.apply(model)
    with _timed(seconds, "train"), _bar(console, "training the blocks", settings.run.max_steps) as advance:
        log = train(
            model, injection, setup.segments.batches(), settings.run,
            on_step=lambda step, loss: advance(step, f"loss {loss:.3f}"),
        )  # fmt: skip
    save_adapter(injection, folder / "adapter", training_step=settings.run.max_steps)
    on, off = evaluate("updates on"), evaluate("updates off", updates=False)
    cleared = None
    if model.context is not None:
        with _timed(seconds, "clear"):
            values = loss_with_memory_cleared(model, document, every=model.context)
        cleared = Curve(name="memory cleared", values=values)
    with _timed(seconds, "compare"):
        agreement = compare_with_training(model, document[:, :COMPARED_FRAMES])
    audio = setup.streamed.audio[:, : max(2, round(settings.run.stream.seconds * codec.mimi.frame_rate))]
    with _timed(seconds, "stream"), _bar(console, "streaming a recording", audio.shape[1]) as advance:
        streamed = stream_recording(
            model, codec, audio, settings.run.stream,
            on_frame=lambda frame: advance(frame, f"{frame * frame_seconds:.0f} s streamed"),
        )  # fmt: skip
    injection.remove()
    results = QuickstartResults(
        training=log, base=base, on=on, off=off, cleared=cleared, agreement=agreement, streamed=streamed,
        control=control(setup, document, console, seconds), twice=twice,
    )  # fmt: skip
    with _timed(seconds, "plots"):
        if streamed.tokens.shape[1]:
            write_wav(folder / "generated.wav", decode(codec.mimi, streamed.tokens[1:]), int(codec.mimi.sample_rate))
        if twice is not None:
            plots.plot_twice(folder / "heard_twice.png", twice, results, frame_seconds=frame_seconds)
        plots.plot_positions(folder / "loss_by_position.png", results, frame_seconds=frame_seconds)
        plots.plot_training(folder / "training.png", log)
        plots.plot_state(folder / "state.png", streamed.change, frame_seconds=frame_seconds)
    return results


def control(setup: Setup, document: Tensor, console: Console, seconds: dict[str, float]) -> Curve | None:
    """The same blocks from the same start on the same segments, trained and evaluated without test-time updates.

    None when they have nothing to train without updates. The model has no blocks before and after.
    """
    model, config = setup.model, setup.settings.run
    injection = setup.plan.apply(model)
    segments = SpeechSegments(setup.codec, setup.speech, config)
    try:
        with (
            _timed(seconds, "control"),
            _bar(console, "training a control without updates", config.max_steps) as advance,
        ):
            log = train(
                model, injection, segments.batches(), config, updates=False,
                on_step=lambda step, loss: advance(step, f"loss {loss:.3f}"),
            )  # fmt: skip
            if not log.losses:
                return None
            return evaluating.evaluate(
                model, injection.host, document, name="trained without updates", updates=False
            )  # fmt: skip
    finally:
        injection.remove()


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - started


@contextmanager
def _bar(console: Console, what: str, total: int) -> Iterator[Any]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("{task.fields[note]}"), console=console) as progress:
        task = progress.add_task(what, total=total, note="")
        yield lambda done, note: progress.update(task, completed=done, note=note)
