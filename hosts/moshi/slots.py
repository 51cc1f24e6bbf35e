"""Rows of one batched LMGen and one batched Mimi as independent streams: slots, which callers join and leave.

A row's tokens, audio and state are bit-equal to those of the same caller with all other rows idle. Rows are out of step
with each other, so every tick sets masks: Mimi encodes under the mask of the rows that have a frame, the language model
steps under the same one, and Mimi decodes under the mask of the rows whose first tokens have come out of the delays.

Shape legend: B rows, Q codebooks of a voice, S samples a frame.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from moshi_ttt.core.errors import HostError
from moshi_ttt.core.volume import volume_switch
from moshi_ttt.hosts.moshi.fit import require_codec, require_talking
from moshi_ttt.hosts.moshi.host import MOSHI_HOST
from moshi_ttt.hosts.moshi.layers import SWITCHES
from moshi_ttt.hosts.moshi.row_state import GENERATOR, Origin, RowKind, RowState, require_continuable
from moshi_ttt.hosts.moshi.row_streams import RowStreams
from moshi_ttt.hosts.moshi.sampling import TEXT_TOP_K, TOP_K, SlotGenerator, SlotSettings
from moshi_ttt.hosts.moshi.slot_stats import RowCounts, SiteStats, site_stats
from moshi_ttt.hosts.moshi.upstream import LMModel, MimiModel

__all__ = ["RowKind", "RowState", "SiteStats", "SlotOutput", "SlotSettings", "Slots"]


@dataclass(frozen=True)
class SlotOutput:
    """What one row gives in one tick.

    Attributes:
        tokens: ``[1 + Q]`` int64 on the CPU: the text token, then the codes of Moshi's voice.
        pcm: ``[S]`` float32 on the CPU, in [-1, 1].
    """

    tokens: Tensor
    pcm: Tensor


@dataclass
class _Caller:
    """What Python keeps of whoever has joined a row.

    Attributes:
        seed: of the generator, which a session brings along.
        steps: of the language model since the stream's start, the first of which ignores its input.
        recent: steps since the row was joined, or its session continued.
    """

    settings: SlotSettings
    generator: torch.Generator
    seed: int
    counts: RowCounts = field(default_factory=RowCounts)
    steps: int = 0
    recent: int = 0

    def continue_from(self, state: RowState) -> None:
        """Count and draw as the row did that ``state`` was saved of."""
        self.counts = state.counts.copy()
        if state.kind == "memory":
            self.counts.frames = 0
            return
        self.generator.set_state(state.tensors[GENERATOR])
        self.seed = state.seed
        self.steps = int(state.tensors["lm/offsets"])

    def step(self, chunks: Iterable[int]) -> None:
        """Count a step of the language model."""
        self.steps += 1
        self.recent += 1
        self.counts.step(chunks, self.settings.updates)


class Slots:
    """``count`` independent streams through one model and one codec, which stream until ``close``.

    Single-threaded: one thread calls all methods. A tick that raises leaves every row undefined.

    Args:
        model: Moshi's language model in eval mode, with or without blocks; its parameters must not change.
        mimi: its codec, set to the codebooks of one voice (``MoshiBundle.load_mimi``).
        count: B, the rows.
        largest_top_k, largest_text_top_k: the most candidates of a token that a row can ask for. With Moshi's own, the
            defaults, a row alone samples what Moshi's own loop samples with the same seed.

    Raises HostError: the two do not belong together, the model does not talk, or one of them is streaming already.
    """

    def __init__(
        self,
        model: LMModel,
        mimi: MimiModel,
        count: int,
        *,
        largest_top_k: int = TOP_K,
        largest_text_top_k: int = TEXT_TOP_K,
    ) -> None:
        if count < 1:
            raise HostError(f"Slots were asked for {count} rows: give 1 or more.")
        require_talking(model, "Slots")
        require_codec(model, mimi)
        if model.training or mimi.training:
            raise HostError("Slots need a model and a codec in eval mode: call eval() on both.")
        self.count = count
        self.frame_size = int(mimi.frame_size)
        self.sample_rate = int(mimi.sample_rate)
        self.frame_rate = float(mimi.frame_rate)
        self.model = model
        self.mimi = mimi
        self._generator = SlotGenerator(model, count, top_k=largest_top_k, text_top_k=largest_text_top_k)
        self._user_codebooks = model.num_codebooks - model.dep_q - 1
        self._pcm = torch.zeros(count, 1, self.frame_size)
        self._rows: dict[int, _Caller] = {}
        self._origin: Origin | None = None
        self._closed = False
        self._streams = RowStreams(self._generator, mimi, count)
        chunks = {state.block.chunk_tokens for state in self._streams.blocks}
        self._chunks = sorted(chunk for chunk in chunks if chunk is not None)

    def __enter__(self) -> Slots:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """End all streams; the model and the codec can then be used otherwise. Warns about updates that were skipped.

        Calling it again does nothing.
        """
        self._closed = True
        self._rows.clear()
        self._streams.close()

    # ---- callers

    @torch.no_grad()
    def join(self, row: int, settings: SlotSettings, state: RowState | None = None) -> None:
        """Start a stream in ``row``, whatever was there, or continue one.

        Args:
            state: a ``memory`` starts a new conversation with it; a ``session`` continues with the row's own
                generator, and ``settings.seed`` is then not used. None starts from the learned memory.

        Raises HostError where the settings or the state do not fit; the row is then as it was.
        """
        self._check_row(row)
        self._check_settings(settings)
        if state is not None:
            require_continuable(state, self._streams.of_kind(state.kind), self.origin)
        self._generator.set_row(row, settings)
        self._streams.clear(row)
        joined = _Caller(settings, torch.Generator().manual_seed(settings.seed), settings.seed)
        if state is not None:
            self._streams.restore(row, state.kind, state.tensors)
            joined.continue_from(state)
        self._rows[row] = joined
        for name in SWITCHES:
            self._streams.switch(row, name, getattr(settings, name))

    def leave(self, row: int) -> None:
        """End the stream in ``row`` and erase all it has left there. Raises HostError where there is none."""
        self._joined(row)
        del self._rows[row]
        self._streams.clear(row)

    @torch.no_grad()
    def tick(self, frames: Mapping[int, Tensor]) -> dict[int, SlotOutput | None]:
        """One frame of every row that has one; the other rows hold still.

        Args:
            frames: row -> ``[S]`` floating point, 24 kHz. What is not finite or outside [-1, 1] is brought there.

        Returns:
            For each of these rows what came out, or None while the model's delays hold back its first tokens.

        Raises HostError for a row that nobody joined, or a frame of another shape or dtype; nothing has happened then.
        """
        for row, frame in frames.items():
            self._joined(row)
            self._check_frame(row, frame)
        if not frames:
            return {}
        if new := [row for row in frames if not self._rows[row].steps]:
            # Moshi ignores the input of a row's first step: a step of its own, so that no frame is lost.
            silence = torch.zeros(self.count, self._user_codebooks, 1, dtype=torch.int64, device=self.model.device)
            self._step(silence, new)
        self.mimi.set_exec_mask(self._mask(frames))
        codes = self.mimi.encode(self._sanitized(frames))[:, : self._user_codebooks]  # [B, 1, S] -> [B, Q, 1]
        tokens = self._step(codes, frames)[..., 0]  # [B, 1 + Q, 1] -> [B, 1 + Q]
        for row in frames:
            self._rows[row].counts.frames += 1
        ready = [row for row in frames if self._rows[row].steps > self._generator.max_delay]
        out: dict[int, SlotOutput | None] = dict.fromkeys(frames)
        if ready:
            self.mimi.set_exec_mask(self._mask(ready))
            # Rows without tokens hold -2, which is no code.
            pcm = self.mimi.decode(tokens[:, 1:, None].clamp(min=0))[:, 0].clamp(-1, 1)  # [B, Q, 1] -> [B, S]
            pcm, tokens = pcm.float().cpu(), tokens.cpu()
            out |= {row: SlotOutput(tokens[row].clone(), pcm[row].clone()) for row in ready}
        return out

    def set_updates(self, row: int, enabled: bool) -> None:
        """Enable or disable what test-time updates write into the memory of ``row``, from the next tick on."""
        joined = self._joined(row)
        joined.settings = replace(joined.settings, updates=enabled)
        self._streams.switch(row, "updates", enabled)

    def set_volume(self, row: int, volume: float) -> None:
        """Set the volume of ``row`` from the next tick on: 0 is the base model. Raises HostError."""
        joined = self._joined(row)
        settings = replace(joined.settings, volume=volume)
        self._check_settings(settings)
        joined.settings = settings
        self._streams.switch(row, "volume", volume)

    @torch.no_grad()
    def forget(self, row: int) -> None:
        """Put the memory of ``row`` back to its learned start. The conversation goes on."""
        joined = self._joined(row)
        self._streams.forget(row)
        joined.counts.forget()

    def restart(self, row: int) -> None:
        """Start a new conversation in ``row`` with the memory that it has: as joining again with ``save_row``'s."""
        settings = self._joined(row).settings
        self.join(row, settings, self.save_row(row, "memory"))

    @torch.no_grad()
    def save_row(self, row: int, kind: RowKind) -> RowState:
        """A copy of the state of ``row`` on the CPU: its memory, or the whole session. The row goes on unchanged."""
        joined = self._joined(row)
        tensors = self._streams.save(row, kind)
        if kind == "session":
            tensors[GENERATOR] = joined.generator.get_state()
        return RowState(kind, self.origin, tensors, counts=joined.counts.copy(), seed=joined.seed)

    @property
    def origin(self) -> Origin:
        """What the states of these rows belong to."""
        if self._origin is None:
            self._origin = Origin.of(self.model, self.mimi)
        return self._origin

    @torch.no_grad()
    def learned_start(self) -> RowState:
        """The memory of a row that has heard nothing."""
        return RowState("memory", self.origin, self._streams.learned_start())

    @torch.no_grad()
    def stats(self, row: int) -> list[SiteStats]:
        """What the memory of ``row`` has done, by site. Reads values from the device: not for every tick."""
        joined = self._joined(row)
        return [site_stats(state, row, joined.counts, joined.recent) for state in self._streams.blocks]

    def warm_up(self, frames: int = 4) -> None:
        """Run ``frames`` of silence, so that a device compiles and captures what the first callers would wait for.

        Raises HostError where somebody has joined.
        """
        if self._rows:
            raise HostError(f"Warm up before anybody joins: rows {sorted(self._rows)} are in use.")
        self.join(0, SlotSettings())
        for _ in range(frames):
            self.tick({0: torch.zeros(self.frame_size)})
        self.leave(0)

    # ---- steps

    def _step(self, codes: Tensor, rows: Iterable[int]) -> Tensor:
        """One step of the language model for ``rows``: ``codes [B, Q, 1]`` to ``[B, 1 + Q, 1]``, -2 where none."""
        rows = list(rows)
        self._generator.draw({row: self._rows[row].generator for row in rows})
        # After every reset, and for every step: a reset sets the mask of its row.
        self._generator.set_exec_mask(self._mask(rows))
        tokens = self._generator.step(codes)
        assert tokens is not None
        for row in rows:
            self._rows[row].step(self._chunks)
        return tokens

    def _mask(self, rows: Iterable[int]) -> Tensor:
        """``[B]`` bool, true in ``rows``."""
        mask = torch.zeros(self.count, dtype=torch.bool)
        mask[list(rows)] = True
        return mask.to(self.model.device)

    def _sanitized(self, frames: Mapping[int, Tensor]) -> Tensor:
        """``[B, 1, S]``: the frames, finite and in [-1, 1], and silence elsewhere."""
        self._pcm.zero_()
        for row, frame in frames.items():
            self._pcm[row, 0] = frame.detach().float().nan_to_num(nan=0.0, posinf=1.0, neginf=-1.0).clamp(-1, 1)
        return self._pcm.to(self.model.device)

    # ---- refusals

    def _check_row(self, row: int) -> None:
        if self._closed:
            raise HostError("These slots are closed. Make new ones.")
        if not 0 <= row < self.count:
            raise HostError(f"There is no row {row}: these slots have rows 0 to {self.count - 1}.")

    def _joined(self, row: int) -> _Caller:
        self._check_row(row)
        if row not in self._rows:
            raise HostError(f"Nobody is in row {row}: call join({row}, settings) first.")
        return self._rows[row]

    def _check_frame(self, row: int, frame: Tensor) -> None:
        if tuple(frame.shape) != (self.frame_size,) or not frame.is_floating_point():
            raise HostError(
                f"The frame of row {row} is {tuple(frame.shape)} {frame.dtype}: give [{self.frame_size}] in a floating "
                f"dtype, {1000 / self.frame_rate:g} ms at {self.sample_rate} Hz."
            )

    def _check_settings(self, settings: SlotSettings) -> None:
        self._generator.check_settings(settings)
        if settings.volume != 1:
            volume_switch(settings.volume, MOSHI_HOST.blocks(self.model))
