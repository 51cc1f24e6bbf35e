"""The folder of a run: created, or, if a run made it and the config says so, replaced or resumed.

``run.json`` is that word. It is written first, and says at the end how the run ended. ``run.lock`` keeps a second run
out while one is going on.
"""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from moshi_ttt.configs.settings import Settings, write_settings
from moshi_ttt.core.atomic import atomic_file
from moshi_ttt.core.errors import ConfigError, MoshiTTTError
from moshi_ttt.system.folder_lock import LOCK, hold
from moshi_ttt.system.output_folder import LITTER
from moshi_ttt.training.checkpoint import NAME, STATE, find_checkpoints
from moshi_ttt.training.inner_losses import FOLDER as INNER_LOSSES
from moshi_ttt.training.logs import METRICS
from moshi_ttt.training.runtime import Runtime
from moshi_ttt.training.step import Outcome

RUN = "run.json"
ARGS = "args.yaml"
"""The settings of a run, in its folder. moshi-finetune writes a file of that name too."""
CHECKPOINTS = "checkpoints"
FORMAT = "moshi-ttt run"
FORMAT_VERSION = 1
MADE = (ARGS, METRICS, "tensorboard", "wandb", INNER_LOSSES)
"""What a run may make in its folder beside ``run.json`` and its checkpoints."""


@dataclass
class RunDir:
    """The folder of a run, held by this run alone; rank 0 reads and writes it, the others ask nothing of the disk.

    Attributes:
        resumed: the checkpoint to resume from, if there is one; equal on every rank.
        same: whether that checkpoint is of this folder.
    """

    settings: Settings
    runtime: Runtime
    resumed: Path | None = None
    same: bool = False

    @property
    def folder(self) -> Path:
        return Path(self.settings.run.run_dir)

    def begin(self) -> None:
        """Make it a folder of this run, in place of an earlier run's where the config says so. On rank 0."""
        run, earlier = self.settings.run, _read(self.folder)
        if earlier is not None and run.overwrite_run_dir and not self.same and run.resume is not True:
            _delete(self.folder, earlier)
            earlier = None
        plots = run.inner_losses.plots and run.inner_losses.plot_dir is None
        chosen = (True, True, run.tensorboard, bool(run.wandb.project), plots)
        made = [name for name, is_made in zip(MADE, chosen, strict=True) if is_made]
        known = earlier or {"format": FORMAT, "format_version": FORMAT_VERSION, "run_id": uuid.uuid4().hex, "made": []}
        known["made"] = sorted({*known["made"], *made})
        self._write({**known, "status": "running", "moshi_ttt": version("moshi-ttt")})
        with atomic_file(self.folder / ARGS) as temporary:
            write_settings(self.settings, temporary)

    @contextmanager
    def opened(self, outcome: Outcome) -> Iterator[None]:
        """The folder opened, and how the run ended written down when the context ends. On rank 0."""
        self.begin()
        status = "failed"
        try:
            yield
            status = "stopped" if outcome.stopped else "done"
        except KeyboardInterrupt:
            status = "interrupted"
            raise
        finally:
            checkpoint = None if outcome.checkpoint is None else str(outcome.checkpoint)
            ended = {"status": status, "step": outcome.step, "checkpoint": checkpoint}
            # Where the run failed because nothing can be written, that is the error to report.
            with suppress(OSError) if status == "failed" else nullcontext():
                if (known := _read(self.folder)) is not None:
                    self._write({**known, **ended})

    def _write(self, values: dict[str, Any]) -> None:
        with atomic_file(self.folder / RUN) as temporary:
            temporary.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


@contextmanager
def hold_run_dir(settings: Settings, runtime: Runtime) -> Iterator[RunDir]:
    """The folder of a run, checked and held while the context lasts; nothing of it is written or deleted yet.

    Raises ConfigError when it is in use and nothing says what to do with it, or no run of ours made what is in it; on
    every rank, when rank 0 finds that.
    """
    folder = RunDir(settings, runtime)
    found: tuple[Path | None, bool] | str | None = None
    with ExitStack() as stack:
        if runtime.first:
            try:
                stack.enter_context(hold(folder.folder))
                resumed = _check(settings)
                found = resumed, resumed is not None and _is_of(resumed, folder.folder)
            except (MoshiTTTError, OSError) as error:
                found = f"run_dir: {error}" if isinstance(error, OSError) else str(error)
        found = runtime.agree(found)
        if isinstance(found, str):
            raise ConfigError(found)
        assert found is not None
        folder.resumed, folder.same = found
        yield folder


def _check(settings: Settings) -> Path | None:
    """The checkpoint to resume from, if there is one. Raises ConfigError."""
    run = settings.run
    folder = Path(run.run_dir)
    earlier = _read(folder)
    if earlier is None and any(path.name not in {LOCK, *LITTER} for path in folder.iterdir()):
        raise ConfigError(_strange(folder))
    if strange := [path.name for path in _named_as_checkpoints(folder) if not (path / STATE).is_file()]:
        raise ConfigError(
            f"run_dir: {folder / CHECKPOINTS} holds {', '.join(strange[:5])}, without a {STATE}: no run of moshi-ttt "
            "made that, and a run here would replace it. Move it away, or choose another run_dir."
        )
    if isinstance(run.resume, str) and not (Path(run.resume) / STATE).is_file():
        raise ConfigError(f"resume: {run.resume} is no complete checkpoint: it has no {STATE}.")
    if run.resume is True:
        return next(reversed(find_checkpoints(folder)), None)
    if isinstance(run.resume, str) and (earlier is None or run.overwrite_run_dir or _is_of(Path(run.resume), folder)):
        return Path(run.resume)
    if earlier is not None and isinstance(run.resume, str):
        raise ConfigError(
            f"resume: {run.resume} is of another run, and run_dir: {folder} holds one of its own. Choose an empty "
            "run_dir, or set overwrite_run_dir: true."
        )
    if earlier is not None and not run.overwrite_run_dir:
        raise ConfigError(
            f"run_dir: {folder} holds an earlier run. Set resume: true to resume it, overwrite_run_dir: true to "
            "delete it, or choose another folder."
        )
    return None


def _strange(folder: Path) -> str:
    """Why a folder that holds something is not a run's."""
    if not (folder / ARGS).is_file():
        return f"run_dir: {folder} is not empty, and no run made it. Choose another, or empty it yourself."
    if checkpoints := find_checkpoints(folder):
        return (
            f"run_dir: {folder} has no {RUN}: an unreleased moshi-ttt made it, before that file was written. It is "
            f"neither resumed nor replaced. Choose another run_dir; adapter: {checkpoints[-1]} starts from the blocks "
            "that it trained."
        )
    return (
        f"run_dir: {folder} has {ARGS} and no {RUN}: another program made it, as moshi-finetune does. It is neither "
        "resumed nor replaced. Choose another run_dir."
    )


def _delete(folder: Path, earlier: dict[str, Any]) -> None:
    """Delete what earlier runs made in ``folder``, and nothing else; ``run.json`` stays until it is replaced."""
    for path in _named_as_checkpoints(folder):
        if (path / STATE).is_file():
            _remove(path)
    checkpoints = folder / CHECKPOINTS
    if checkpoints.is_dir():
        for left in checkpoints.glob(".checkpoint_*"):
            _remove(left)
        if not any(checkpoints.iterdir()):
            checkpoints.rmdir()
    for name in set(MADE).intersection(earlier["made"]):
        _remove(folder / name)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _named_as_checkpoints(folder: Path) -> list[Path]:
    places = sorted((folder / CHECKPOINTS).glob("checkpoint_*"))
    return [path for path in places if NAME.fullmatch(path.name)]


def _read(folder: Path) -> dict[str, Any] | None:
    """What ``run.json`` says; None where there is none, or it is not ours. Raises ConfigError: of another version."""
    try:
        found = json.loads((folder / RUN).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        return None
    if found.get("format_version") != FORMAT_VERSION:
        raise ConfigError(
            f"run_dir: {folder / RUN} is of format {found.get('format_version')!r}, and this moshi-ttt knows "
            f"{FORMAT_VERSION}. Use the version that made it ({found.get('moshi_ttt')}), or choose another run_dir."
        )
    return found


def _is_of(checkpoint: Path, folder: Path) -> bool:
    """Whether a checkpoint is one of the run in ``folder``."""
    return checkpoint.resolve().parent == (folder / CHECKPOINTS).resolve()
