"""``moshi-ttt generate``, from recordings to a folder of answers."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

from moshi_ttt.apps.generate.inputs import USER_CHANNELS, Take, takes_of
from moshi_ttt.apps.generate.job import AnswerJob
from moshi_ttt.apps.talker import chosen_adapter, load_talker
from moshi_ttt.core.errors import ConfigError, HostError
from moshi_ttt.hosts.moshi.row_state import RowState
from moshi_ttt.hosts.moshi.slots import SlotSettings
from moshi_ttt.system.output_folder import OutputError, check_free, new_folder
from moshi_ttt.system.threads import computing, largest

MADE_BY = "moshi-ttt generate"
AT_ONCE = 4
"""Recordings that are answered at once where --slots does not say."""
MEMORY_SUFFIX = ".safetensors"


@dataclass(frozen=True, kw_only=True)
class GenerateRequest:
    """What the command line asks for; see its help. ``settings`` has the seed of the first answers alone."""

    recordings: tuple[Path, ...]
    out: Path
    config: str = "quickstart"
    adapter: str | None = None
    seeds: tuple[int, ...] = (0,)
    settings: SlotSettings = field(default_factory=SlotSettings)
    memory_in: Path | None = None
    memory_out: Path | None = None
    stereo: bool = False
    user_channel: str = "mean"
    inner_loss: bool = False
    slots: int | None = None
    overwrite: bool = False
    threads: int | None = None


def run(request: GenerateRequest, console: Console) -> str:
    """Answer all recordings into ``request.out``; a sentence on those that have no answer, or nothing.

    A recording that cannot be read, or an answer that cannot be written, leaves the others as they are. Where another
    error or an interruption ends the work, the answers that are complete are in the folder all the same, and the error
    is raised. Raises MoshiTTTError where nothing was answered; there is no new folder then.
    """
    if request.user_channel not in USER_CHANNELS:
        raise ConfigError(f"--user-channel {request.user_channel!r}: allowed are {', '.join(USER_CHANNELS)}.")
    takes = takes_of(request.recordings, request.seeds)
    check_free(request.out, made_by=MADE_BY, overwrite=request.overwrite)
    places = memory_places(request, takes)
    memory = None if request.memory_in is None else read_memory(request.memory_in)
    talker = load_talker(request.config, chosen_adapter(request.config, request.adapter))
    with (
        computing(largest(talker.model, talker.mimi), request.threads),
        new_folder(request.out, made_by=MADE_BY, overwrite=request.overwrite) as folder,
    ):
        job = AnswerJob(
            talker=talker, takes=takes, settings=request.settings, memory=memory, folder=folder,
            memory_places={name: _inside(request.out, folder, path) for name, path in places.items()},
            stereo=request.stereo, user_channel=request.user_channel,
            inner_loss=request.inner_loss, slots=request.slots or min(AT_ONCE, len(takes)), made_by=MADE_BY,
        )  # fmt: skip
        ended_by = job.run(console)
    console.print(f"{len(job.answered)} answer(s) in {request.out}.", highlight=False, soft_wrap=True)
    if ended_by is not None:
        raise ended_by
    lost = ", ".join(job.failed)
    return f"{len(job.failed)} recording(s) have no answer: {lost}. report.md says why." if lost else ""


def read_memory(path: Path) -> RowState:
    """A saved memory. Raises HostError for anything else, a whole session too: its seed would not be the one given."""
    state = RowState.load(path)
    if state.kind != "memory":
        raise HostError(f"{path} holds a whole {state.kind}, and --memory-in takes a memory. Save the memory alone.")
    return state


def memory_places(request: GenerateRequest, takes: list[Take]) -> dict[str, Path]:
    """Where the memory of each take goes, by its name. Raises OutputError for what may not be replaced."""
    chosen = request.memory_out
    if chosen is None:
        return {}
    if len(takes) == 1:
        places = {takes[0].name: chosen}
        if chosen.is_dir():
            raise OutputError(f"{chosen} is a folder, and one memory is a file. Choose another --memory-out.")
    else:
        places = {take.name: chosen / f"{take.name}{MEMORY_SUFFIX}" for take in takes}
        if chosen.is_file():
            raise OutputError(
                f"{chosen} is a file, and {len(takes)} memories need a folder. Choose another --memory-out."
            )
    for path in places.values():
        if path.exists() and not request.overwrite:
            raise OutputError(f"{path} exists. Choose another --memory-out, or add --overwrite to replace it.")
    return places


def _inside(out: Path, folder: Path, path: Path) -> Path:
    """``path``, or its place in ``folder`` where it lies in ``out``, which ``folder`` is to become."""
    whole, outer = path.absolute(), out.absolute()
    return folder / whole.relative_to(outer) if outer in whole.parents else path
