"""The work of ``moshi-ttt generate``: recordings through the slots, each answer to files as soon as it is complete."""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from moshi_ttt.apps.generate.inputs import Take, UserChannel, read_user
from moshi_ttt.apps.generate.screen import Screen
from moshi_ttt.apps.generate.writing import AnswerFormat, remove_answer, write_all
from moshi_ttt.apps.talker import Talker
from moshi_ttt.core.errors import MoshiTTTError
from moshi_ttt.data.audio_files import AudioError, read_header
from moshi_ttt.data.spoken import SpokenText
from moshi_ttt.hosts.moshi.row_state import RowState
from moshi_ttt.hosts.moshi.sampling import TEXT_TOP_K, TOP_K
from moshi_ttt.hosts.moshi.slots import SlotOutput, Slots, SlotSettings
from moshi_ttt.serving.offline import Answer, AnswerOptions, OfflineCaller, Unanswered, answer

STATS_SECONDS = 1.0
"""Between two looks at the blocks' figures."""


@dataclass(kw_only=True)
class AnswerJob:
    """The answers of one command.

    Attributes:
        settings: of every take, but for its seed.
        memory: what every take begins with.
        folder: for the answers; it is not yet in its place.
        memory_places: where the memory of a take goes, by its name; empty where none is kept.
        slots: takes that are answered at once.
        answered: what the JSON of each answer says, by the take's name.
        failed: why a take has no answer, by its name.
    """

    talker: Talker
    takes: list[Take]
    settings: SlotSettings
    memory: RowState | None
    folder: Path
    memory_places: dict[str, Path]
    stereo: bool
    user_channel: UserChannel
    inner_loss: bool
    slots: int
    made_by: str
    answered: dict[str, dict[str, Any]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    def run(self, console: Console) -> BaseException | None:
        """Answer all takes, and write the report; the error that ended the work before its end, or None.

        Raises what ended it, or why the first take has no answer, where nothing was answered.
        """
        started = time.perf_counter()
        errors: list[Exception] = []
        ended_by: BaseException | None = None
        try:
            self._answer_all(console, errors)
        except BaseException as error:  # an interruption too: what is complete is kept
            if not self.answered:
                raise
            ended_by = error
            for take in self.takes:
                if take.name not in self.answered:
                    self.failed.setdefault(take.name, "The command ended before its answer was complete.")
        if not self.answered:
            raise errors[0]
        write_all(self.folder, self.form, self.answered, self.failed, time.perf_counter() - started)
        return ended_by

    @property
    def form(self) -> AnswerFormat:
        chosen = asdict(self.settings)
        del chosen["seed"]  # each answer's own
        begins = "learned" if self.memory is None else f"saved after {self.memory.counts.tokens} tokens"
        facts = {
            **self.talker.facts, **chosen, "slots": self.slots, "user_channel": self.user_channel,
            "memory_at_the_start": begins,
        }  # fmt: skip
        mimi = self.talker.mimi
        return AnswerFormat(
            made_by=self.made_by, sample_rate=int(mimi.sample_rate), frame_rate=float(mimi.frame_rate),
            stereo=self.stereo, facts=facts,
        )  # fmt: skip

    def _answer_all(self, console: Console, errors: list[Exception]) -> None:
        """Every take, as many at once as there are slots; ``errors`` gets those that concern one take alone."""
        mimi, tokenizer = self.talker.mimi, self.talker.codec.tokenizer
        rate = float(mimi.frame_rate)
        takes = {take.name: take for take in self.takes}
        texts = {
            name: SpokenText(tokenizer, silent=self.talker.silent_tokens, frame_rate=rate) for name in takes
        }  # fmt: skip
        options = AnswerOptions(
            stats_every=round(STATS_SECONDS * rate) if self.inner_loss else None, keep_memory=bool(self.memory_places)
        )
        total = sum(self._frames(take) for take in self.takes)
        with (
            self._slots() as slots,
            Screen(console, total=total, frame_rate=rate) as screen,
        ):

            def heard(caller: OfflineCaller, output: SlotOutput | None) -> None:
                token = None if output is None else int(output.tokens[0])
                screen.heard(caller.name, "" if token is None else texts[caller.name].add(token))

            for outcome in answer(slots, [self._caller(take) for take in self.takes], options, on_frame=heard):
                take = takes[outcome.caller.name]
                try:
                    if isinstance(outcome, Unanswered):
                        raise outcome.error
                    self._keep(take, outcome, texts[take.name])
                    screen.ended(take.name, f"{outcome.frames / rate:.1f} s answered")
                except (MoshiTTTError, OSError) as error:
                    errors.append(error)
                    self.failed[take.name] = " ".join(str(error).split())
                    screen.ended(take.name, f"no answer. {error}")

    def _slots(self) -> Slots:
        """As many as are asked for; for more candidates than Moshi's own only where they are asked for."""
        return Slots(
            self.talker.model, self.talker.mimi, self.slots, largest_top_k=max(TOP_K, self.settings.top_k),
            largest_text_top_k=max(TEXT_TOP_K, self.settings.text_top_k),
        )  # fmt: skip

    def _caller(self, take: Take) -> OfflineCaller:
        rate = int(self.talker.mimi.sample_rate)
        return OfflineCaller(
            name=take.name, read=partial(read_user, take.path, rate, self.user_channel),
            settings=replace(self.settings, seed=take.seed), memory=self.memory,
        )  # fmt: skip

    def _keep(self, take: Take, found: Answer, spoken: SpokenText) -> None:
        """The files of a complete answer: all of them, or none and the error."""
        try:
            values = self.form.write(self.folder, take.name, found, spoken, input=str(take.path), seed=take.seed)
            if found.memory is not None:
                place = self.memory_places[take.name]
                place.parent.mkdir(parents=True, exist_ok=True)
                found.memory.save(place)
        except BaseException:
            remove_answer(self.folder, take.name)
            raise
        self.answered[take.name] = values

    def _frames(self, take: Take) -> int:
        """How long the bar is for a take; 0 for one that will not be answered."""
        try:
            seconds = read_header(take.path, stretches=False).seconds
        except AudioError:
            return 0
        return math.ceil(seconds * float(self.talker.mimi.frame_rate))
