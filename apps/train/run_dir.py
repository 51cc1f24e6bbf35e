"""The folder of a run: made, replaced, or gone on in, only where the config says so."""

from __future__ import annotations

import shutil
from pathlib import Path

from moshi_ttt.apps.train.checkpoint import STATE, find_checkpoints
from moshi_ttt.apps.train.runtime import Runtime
from moshi_ttt.apps.train.settings import Settings, write_settings
from moshi_ttt.core.errors import ConfigError

ARGS = "args.yaml"
"""The settings of a run, in its folder: what tells that the folder is a run's."""


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
    if isinstance(run.resume, str) and not (Path(run.resume) / STATE).is_file():
        raise ConfigError(f"resume: {run.resume} is no complete checkpoint: it has no {STATE}.")
    if run.resume is True:
        return next(reversed(find_checkpoints(folder)), None)
    if isinstance(run.resume, str) and (not used or run.overwrite_run_dir or _goes_on_in(run.resume, folder)):
        return Path(run.resume)
    if used and isinstance(run.resume, str):
        raise ConfigError(
            f"resume: {run.resume} is of another run, and run_dir: {folder} holds one of its own. Choose an empty "
            "run_dir, or set overwrite_run_dir: true."
        )
    if used and not run.overwrite_run_dir:
        raise ConfigError(
            f"run_dir: {folder} holds an earlier run. Set resume: true to go on with it, overwrite_run_dir: true to "
            "delete it, or choose another folder."
        )
    return None


def open_run_dir(settings: Settings) -> None:
    """Make the run's folder, in place of an earlier run's where the config says so."""
    run = settings.run
    folder = Path(run.run_dir)
    goes_on = run.resume is True or (isinstance(run.resume, str) and _goes_on_in(run.resume, folder))
    if _in_use(folder) and run.overwrite_run_dir and not goes_on:
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_settings(settings, folder / ARGS)


def _goes_on_in(checkpoint: str, folder: Path) -> bool:
    """Whether a checkpoint is one of the run in ``folder``."""
    return Path(checkpoint).resolve().parent == (folder / "checkpoints").resolve()


def _in_use(folder: Path) -> bool:
    return folder.is_dir() and any(folder.iterdir())
