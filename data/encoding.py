"""``moshi-ttt encode``: encode recordings once, as shards of tokens."""

from __future__ import annotations

from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from moshi_ttt.configs.settings import Settings
from moshi_ttt.core.errors import ConfigError
from moshi_ttt.data.codec import SpeechCodec
from moshi_ttt.data.shards import write_shards
from moshi_ttt.hosts.moshi.compatibility import require_trainable
from moshi_ttt.hosts.moshi.host import MOSHI_HOST
from moshi_ttt.system import threads


def encode(settings: Settings, out: Path, console: Console, *, held_out: bool) -> None:
    """Write the shards of the run's training data, or of its evaluation data, to ``out``.

    Raises ConfigError when the config names none, DataError and OutputError as ``write_shards``.
    """
    data = settings.run.data
    source = data.eval_data if held_out else data.train_data
    if not source:
        raise ConfigError("The config has no data.eval_data, so there is nothing to encode. Leave out --eval.")
    device = settings.run.device or ("cuda" if torch.cuda.is_available() else "cpu")
    model = MOSHI_HOST.skeleton(settings.host)
    codec = SpeechCodec.load(
        settings.host, device, require=require_trainable, model=model, moshi_channel=data.moshi_channel,
        speaker_label=data.speaker_label,
    )  # fmt: skip
    columns = (TextColumn("encoding"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    computing = threads.computing(threads.largest(model, codec.mimi), settings.run.threads)
    with computing, Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=None)
        summary = write_shards(
            source, out, codec, frames=codec.frames_of(settings.run.duration_sec), transcripts=data.transcripts,
            max_bad_share=data.max_bad_share,
            progress=lambda done, total, name: progress.update(task, completed=done, total=total),
        )  # fmt: skip
    for problem in summary.problems:
        console.print(f"Warning: left out: {problem}", highlight=False, markup=False, soft_wrap=True)
    for note in summary.notes:
        console.print(f"Warning: {note}", highlight=False, markup=False, soft_wrap=True)
    if summary.words is not None:
        console.print(str(summary.words), highlight=False, markup=False, soft_wrap=True)
    key = "data.eval_data" if held_out else "data.train_data"
    console.print(
        f"{summary.recordings:,} recordings, {summary.seconds / 60:,.1f} min, {summary.bytes / 1e6:,.1f} MB in "
        f"{summary.shards} shard(s). Train with {key}={out}",
        highlight=False, markup=False, soft_wrap=True,
    )  # fmt: skip
