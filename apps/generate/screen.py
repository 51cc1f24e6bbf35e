"""What ``moshi-ttt generate`` shows while it runs: the text as it comes, how far it is, and what went wrong."""

from __future__ import annotations

from dataclasses import dataclass
from types import TracebackType

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

PAUSE_FRAMES = 10
"""So many frames without text end a line."""
LINE_LENGTH = 72


@dataclass
class _Line:
    """The line of text that one recording's answer is in.

    Attributes:
        start: its first frame.
        quiet: frames since its last text.
    """

    start: int
    text: str = ""
    quiet: int = 0


class Screen:
    """Lines of text, each with its time and the recording it answers, above a bar of all frames.

    Args:
        total: frames of all recordings.
    """

    def __init__(self, console: Console, *, total: int, frame_rate: float) -> None:
        self._frame_rate = frame_rate
        self._lines: dict[str, _Line] = {}
        self._frames: dict[str, int] = {}
        self._progress = Progress(
            TextColumn("answering"), BarColumn(bar_width=20), TaskProgressColumn(), TimeRemainingColumn(),
            console=console, disable=not console.is_terminal,
        )  # fmt: skip
        self._task = self._progress.add_task("", total=total)

    def __enter__(self) -> Screen:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for name in list(self._lines):
            self._end_line(name)
        self._progress.stop()

    def heard(self, name: str, piece: str) -> None:
        """One more frame of the recording ``name``, in which Moshi said ``piece``."""
        frame = self._frames[name] = self._frames.get(name, 0) + 1
        self._progress.advance(self._task)
        line = self._lines.get(name)
        if piece and line is not None and piece.startswith(" ") and len(line.text) + len(piece) > LINE_LENGTH:
            self._end_line(name)
            line = None
        if piece:
            line = self._lines.setdefault(name, _Line(frame - 1))
            line.text += piece
            line.quiet = 0
        elif line is not None:
            line.quiet += 1
            if line.quiet >= PAUSE_FRAMES:
                self._end_line(name)

    def ended(self, name: str, message: str) -> None:
        """The recording's answer is complete, or there is none: say so."""
        self._end_line(name)
        self._say(f"[bold]{escape(name)}[/]: {escape(message)}")

    def _end_line(self, name: str) -> None:
        line = self._lines.pop(name, None)
        if line is not None:
            minutes, seconds = divmod(line.start / self._frame_rate, 60)
            self._say(f"{escape(name)} {int(minutes)}:{seconds:04.1f}  {escape(line.text.strip())}")

    def _say(self, text: str) -> None:
        self._progress.console.print(text, highlight=False, soft_wrap=True)
