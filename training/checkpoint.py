"""Checkpoints to resume from: written in the background, complete or absent, for any number of ranks.

A checkpoint is a folder ``checkpoints/checkpoint_000100``: ``state.json`` says where the run was, ``resume/`` holds
what resuming needs (torch.distributed.checkpoint), and whatever was exported lies beside them. It is written under a
hidden name and renamed when every rank has finished, so that a folder with that name is always complete.
"""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as load_tensors
from torch.distributed.checkpoint.state_dict_saver import async_save

from moshi_ttt.core.atomic import publish
from moshi_ttt.core.block import Site
from moshi_ttt.core.errors import MoshiTTTError
from moshi_ttt.core.host import CarriedState
from moshi_ttt.core.sharding import local
from moshi_ttt.training.optimizer import advance
from moshi_ttt.training.runtime import Runtime
from moshi_ttt.training.trainer import Trainer

FORMAT_VERSION = 1
STATE = "state.json"
RESUME = "resume"
NAME = re.compile(r"checkpoint_(\d{6,})")
Export = Callable[[Path], None]
FREE = ("ranks", "threads", "versions", "training", "bad_segments")
"""Entries of ``state.json`` that a resumed run may change."""


class CheckpointError(MoshiTTTError, RuntimeError):
    """A checkpoint that cannot be written, read, or resumed from."""


def find_checkpoints(run_dir: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    found = [path for path in (run_dir / "checkpoints").glob("checkpoint_*") if NAME.fullmatch(path.name)]
    return sorted((path for path in found if (path / STATE).is_file()), key=_step_of)


def read_state(folder: Path) -> dict[str, Any]:
    """The contents of ``state.json``. Raises CheckpointError."""
    try:
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _damaged(folder, f"{STATE} cannot be read: {error}") from None
    if not isinstance(state, dict) or state.get("format_version") != FORMAT_VERSION:
        given = state.get("format_version") if isinstance(state, dict) else None
        raise CheckpointError(
            f"{folder} has format {given!r}, and this version reads {FORMAT_VERSION}. Use the version that wrote it, "
            f"or start from its blocks with adapter: {folder}."
        )
    return state


def _damaged(folder: Path, why: str) -> CheckpointError:
    """The error of a checkpoint that cannot be read; it names the newest older one of the same run that can."""
    number = NAME.fullmatch(folder.name)
    older = find_checkpoints(folder.parent.parent) if number else []
    for other in reversed([each for each in older if _step_of(each) < _step_of(folder)]):
        if _seems_whole(other):
            hint = f"{other} can be read: resume from it with resume={other}."
            return CheckpointError(f"{folder} is damaged: {why}. {hint}")
    return CheckpointError(f"{folder} is damaged: {why}. There is no older checkpoint of this run to resume from.")


def _seems_whole(folder: Path) -> bool:
    """Whether a checkpoint's own records can be read, and every file that they name is there and long enough."""
    try:
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
        metadata = FileSystemReader(folder / RESUME).read_metadata()
        ends: dict[str, int] = {}
        for place in (metadata.storage_data or {}).values():
            ends[place.relative_path] = max(ends.get(place.relative_path, 0), place.offset + place.length)
        return state["format_version"] == FORMAT_VERSION and all(
            (folder / RESUME / name).stat().st_size >= end for name, end in ends.items()
        )
    except Exception:  # whatever is wrong with it, it is not one to offer
        return False


@dataclass
class _Pending:
    """A checkpoint that is being written."""

    temporary: Path
    folder: Path
    tensors: Future[Any]
    export: Future[None]
    state: Mapping[str, Any]
    began: float
    ended: list[float]


class CheckpointWriter:
    """Writes checkpoints in the background and keeps the newest ``keep`` of them (all when None).

    Those of steps after ``step``, where this run begins, are of a run that was given up: they go when the first new one
    is there.

    Attributes:
        seconds: what the checkpoint that was committed last took on this rank.
    """

    def __init__(self, run_dir: Path, runtime: Runtime, keep: int | None, step: int) -> None:
        self.folder = run_dir / "checkpoints"
        self.runtime = runtime
        self.keep = keep
        self._given_up = [path for path in find_checkpoints(run_dir) if _step_of(path) > step]
        self._pending: _Pending | None = None
        self._executor = ThreadPoolExecutor(1)
        self.seconds = 0.0
        latest = None
        if runtime.first:
            self.folder.mkdir(parents=True, exist_ok=True)
            for left in self.folder.glob(".checkpoint_*"):
                shutil.rmtree(left)
            latest = step if any(_step_of(path) == step for path in find_checkpoints(run_dir)) else None
        self._latest: int | None = runtime.agree(latest)

    @property
    def ready(self) -> bool:
        """Whether this rank has written its part of the pending checkpoint, if there is one."""
        return self._pending is not None and self._pending.tensors.done() and self._pending.export.done()

    def has(self, step: int) -> bool:
        """Whether the newest checkpoint of this run, written or being written, is of this step; equal on every rank."""
        return self._latest == step

    def save(self, trainer: Trainer, *, position: Mapping[str, Any], export: Export, began: float) -> None:
        """Begin to write a checkpoint of this step; every rank calls this. An earlier one must be finished first.

        Args:
            position: what ``state.json`` holds beside the step.
            export: writes what others use into a folder; called on rank 0, in the background.
            began: when preparing it began, by ``time.monotonic``.
        """
        assert self._pending is None
        name = f"checkpoint_{trainer.step:06d}"
        temporary = self.folder / f".{name}"
        if self.runtime.first:
            temporary.mkdir()
        self.runtime.wait()
        writer = FileSystemWriter(temporary / RESUME, sync_files=True)
        # Tensors are copied before this returns: training may change them while they are written.
        tensors = async_save(_tensors(trainer), storage_writer=writer, process_group=self.runtime.saving)
        written = self._executor.submit(export, temporary) if self.runtime.first else _nothing()
        state = {"format_version": FORMAT_VERSION, "step": trainer.step, **position}
        ended: list[float] = []
        for part in (cast(Future[Any], tensors), written):
            part.add_done_callback(lambda _: ended.append(time.monotonic()))
        self._pending = _Pending(
            temporary, self.folder / name, cast(Future[Any], tensors), written, state, began, ended
        )
        self._latest = trainer.step

    def commit(self) -> Path | None:
        """Make the pending checkpoint appear, once every rank is ``ready``; None where there is none."""
        pending, self._pending = self._pending, None
        if pending is None:
            return None
        try:
            pending.tensors.result()
            pending.export.result()
            if self.runtime.first:
                text = json.dumps(pending.state, indent=2) + "\n"
                (pending.temporary / STATE).write_text(text, encoding="utf-8")
                for old in self._given_up:
                    _remove(old)
                self._given_up = []
                publish(pending.temporary, pending.folder)
                self._prune()
        except (Exception, CheckpointException) as error:
            if self.runtime.first:
                shutil.rmtree(pending.temporary, ignore_errors=True)
            raise CheckpointError(
                f"{pending.folder} cannot be written: {_cause(error)}. Make room or check the disk, then resume with "
                "resume: true from the checkpoint before."
            ) from error
        self.seconds = max(pending.ended, default=time.monotonic()) - pending.began  # callbacks come after results
        return pending.folder

    def finish(self) -> Path | None:
        """Wait for the pending checkpoint and make it appear; every rank calls this."""
        if self._pending is not None:
            wait([self._pending.tensors, self._pending.export])
            self.runtime.wait()
        folder = self.commit()
        self.runtime.wait()
        return folder

    def close(self) -> None:
        """End the background thread; a pending checkpoint that is not finished stays unfinished."""
        self._executor.shutdown(wait=False, cancel_futures=True)

    def _prune(self) -> None:
        if self.keep is None:
            return
        for old in find_checkpoints(self.folder.parent)[: -self.keep]:
            _remove(old)


def _step_of(folder: Path) -> int:
    return int(folder.name.split("_")[1])


def _remove(folder: Path) -> None:
    going = folder.with_name(f".{folder.name}.old")
    folder.rename(going)  # at once: a reader never sees half of it
    shutil.rmtree(going)


def _cause(error: BaseException) -> str:
    """What went wrong, in a line: torch wraps it in the tracebacks of all ranks."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else error!r}"


def _nothing() -> Future[None]:
    done: Future[None] = Future()
    done.set_result(None)
    return done


def load(trainer: Trainer, folder: Path, position: Mapping[str, Any]) -> None:
    """Restore a new trainer from the checkpoint, bit for bit; every rank calls this.

    ``position`` is what this run would write: it decides whether the run can go on from there.

    Raises CheckpointError: other data, seed or global batch, or another set of trained parameters.
    """
    state = read_state(folder)
    if int(state["step"]) > trainer.config.max_steps:
        most = trainer.config.max_steps
        raise CheckpointError(f"{folder} is at step {state['step']}, and max_steps is {most}: raise it.")
    different = [
        f"{key} was {state.get(key)!r} and is {value!r}"
        for key, value in position.items()
        if key not in FREE and state.get(key) != value
    ]
    if different:
        hint = ""
        if state.get("rows") != position.get("rows"):
            hint = " Rows are batch_size x num_microbatches x ranks: change num_microbatches so that they are the same."
        raise CheckpointError(f"{folder} cannot be resumed by this run: {'; '.join(different)}.{hint}")
    try:
        reader = FileSystemReader(folder / RESUME)
        stored = reader.read_metadata().state_dict_metadata
    except Exception as error:
        raise _damaged(folder, f"{type(error).__name__}: {error}") from error
    wanted = _parameters(trainer)
    saved = {key for key in stored if key.startswith(("model/", "optimizer/", "buffer/"))}
    if wanted.keys() != saved:
        apart = sorted(wanted.keys() ^ saved)
        raise CheckpointError(f"{folder} is of a run that trained other parameters: {', '.join(apart[:6])}, ...")
    carried = _empty_carried(trainer, stored)
    random = {key: _empty(stored[key]) for key in _random(trainer.runtime) if key in stored}
    try:
        load_tensors({**wanted, **carried, **random}, storage_reader=reader, process_group=trainer.runtime.saving)
    except CheckpointException as error:
        raise _damaged(folder, _cause(error)) from error
    _restore_carried(trainer, carried)
    _restore_random(trainer.runtime, random)
    trainer.step = int(state["step"])
    advance(trainer.schedule, min(trainer.step, trainer.config.max_steps - 1))


# ---- what a checkpoint holds, by name


def _tensors(trainer: Trainer) -> dict[str, Tensor]:
    return {**_parameters(trainer), **_carried(trainer), **_random(trainer.runtime)}


def num_bytes(trainer: Trainer) -> int:
    """Bytes of a checkpoint on this rank, without carried state."""
    return sum(local(tensor).nbytes for tensor in _parameters(trainer).values())


def _parameters(trainer: Trainer) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, parameter in trainer.trained.trained().items():
        found[f"model/{name}"] = parameter.detach()
        for key, value in trainer.optimizer.state[parameter].items():
            found[f"optimizer/{name}/{key}"] = value
    for name, buffer in trainer.trained.injection.named_buffers():
        found[f"buffer/{name}"] = buffer
    return found


def _rows(trainer: Trainer) -> dict[tuple[int, int], int]:
    """(micro-batch, row in it) on this rank -> row of the global batch."""
    size, runtime = trainer.config.batch_size, trainer.runtime
    return {
        (m, b): (m * runtime.world_size + runtime.rank) * size + b
        for m in range(trainer.config.num_microbatches)
        for b in range(size)
    }


def _carried(trainer: Trainer) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for (m, b), row in _rows(trainer).items():
        state = trainer.carried[m]
        if state is not None and state.document_ids is not None:
            found[f"carried/{row}/document"] = state.document_ids[b : b + 1].clone()
            for site, tensors in state.blocks.items():
                for name, tensor in tensors.items():
                    found[f"carried/{row}/{site}/{name}"] = tensor[b : b + 1].detach().clone()
    return found


def _empty(stored: Any) -> Tensor:
    assert isinstance(stored, TensorStorageMetadata)
    return torch.empty(stored.size, dtype=stored.properties.dtype)


def _empty_carried(trainer: Trainer, stored: Mapping[str, Any]) -> dict[str, Tensor]:
    rows = set(_rows(trainer).values())
    keys = [key for key in stored if key.startswith("carried/") and int(key.split("/")[1]) in rows]
    return {key: _empty(stored[key]) for key in keys}


def _restore_carried(trainer: Trainer, carried: Mapping[str, Tensor]) -> None:
    if not carried:
        return
    places, device = _rows(trainer), trainer.runtime.device
    for m in range(trainer.config.num_microbatches):
        rows = [places[m, b] for b in range(trainer.config.batch_size)]
        parts: dict[tuple[str, ...], list[Tensor]] = {}
        for row in rows:
            for key, tensor in carried.items():
                _, number, *rest = key.split("/")
                if int(number) == row:
                    parts.setdefault(tuple(rest), []).append(tensor.to(device))
        state = CarriedState(document_ids=torch.cat(parts.pop(("document",))))
        for (site, name), tensors in parts.items():
            state.blocks.setdefault(Site.parse(site), {})[name] = torch.cat(tensors)
        blocks = trainer.trained.injection.blocks
        state.blocks = {site: blocks[site].upgrade_state(saved) for site, saved in sorted(state.blocks.items())}
        trainer.carried[m] = state


def _random(runtime: Runtime) -> dict[str, Tensor]:
    found = {f"random/{runtime.rank}/cpu": torch.get_rng_state()}
    if runtime.device.type == "cuda":
        found[f"random/{runtime.rank}/cuda"] = torch.cuda.get_rng_state(runtime.device)
    return found


def _restore_random(runtime: Runtime, random: Mapping[str, Tensor]) -> None:
    for key, state in random.items():
        if key.endswith("/cpu"):
            torch.set_rng_state(state)
        else:
            torch.cuda.set_rng_state(state, runtime.device)
