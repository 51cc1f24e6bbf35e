"""What a run has found: checks with a limit, figures, and what became of each section."""

from __future__ import annotations

import gc
import json
import math
import statistics
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def error(actual: Tensor, expected: Tensor) -> float:
    """max |a - b| / max(1, max |b|), in float64 on the CPU; NaN anywhere gives NaN."""
    a, b = actual.detach().double().cpu(), expected.detach().double().cpu()
    return float((a - b).abs().max() / b.abs().max().clamp(min=1.0))


def relative(actual: Tensor, expected: Tensor) -> float:
    """||a - b|| / ||b||, in float64 on the CPU: for gradients, whose scale means nothing."""
    a, b = actual.detach().double().cpu(), expected.detach().double().cpu()
    return float((a - b).norm() / b.norm().clamp(min=1e-30))


@dataclass
class Report:
    """Collects what the sections find, and writes it after each of them.

    Attributes:
        device: what everything runs on.
        small: shapes for trying this script, not a GPU.
        budget: seconds for the whole run.
        expected: the sections that a whole run has; one that has not run yet, or was left out, is no pass.
    """

    folder: Path
    device: torch.device
    small: bool
    budget: float
    expected: tuple[str, ...] = ()
    began: float = field(default_factory=time.monotonic)
    checks: list[dict[str, Any]] = field(default_factory=list)
    figures: dict[str, dict[str, Any]] = field(default_factory=dict)
    sections: dict[str, dict[str, Any]] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    section: str = ""

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def left(self) -> float:
        """Seconds of the budget that are left."""
        return self.budget - (time.monotonic() - self.began)

    def check(self, name: str, value: float, limit: float, note: str = "") -> bool:
        """A number that must not be above ``limit``; NaN never passes."""
        passed = bool(value <= limit)
        self.checks.append({
            "section": self.section, "name": name, "value": _json(float(value)), "limit": float(limit),
            "passed": passed, "note": note,
        })  # fmt: skip
        sign = "ok  " if passed else "FAIL"
        print(f"  {sign} {name}: {value:.3g} (at most {limit:.3g}){' ' if note else ''}{note}", flush=True)
        return passed

    def figure(self, name: str, **values: Any) -> None:
        """A measurement: numbers with their units in their names."""
        self.figures[name] = {key: _json(value) for key, value in values.items()}
        print(f"  {name}: {_shown(values)}", flush=True)

    def failed(self, section: str) -> list[dict[str, Any]]:
        return [check for check in self.checks if check["section"] == section and not check["passed"]]

    def run(self, name: str, seconds: float, function: Callable[[Report], None], needs: tuple[str, ...] = ()) -> None:
        """One section. It is skipped where less than a third of its ``seconds`` is left, and where one it needs is red.

        A section that fails is reported, and the others go on.
        """
        self.section = name
        print(f"== {name}: {(function.__doc__ or name).splitlines()[0]}", flush=True)
        missing = [other for other in needs if not self.section_passed(other)]
        if missing:
            self._ended(name, "skipped", f"{', '.join(missing)} did not pass: a time of wrong results means nothing")
            return
        if self.left < seconds / 3:
            self._ended(name, "skipped", f"{max(0.0, self.left):.0f} s of the budget are left")
            return
        began = time.monotonic()
        try:
            function(self)
        except Exception as problem:  # whatever it is, the other sections go on
            traceback.print_exc()
            self._ended(name, "error", f"{type(problem).__name__}: {str(problem)[:500]}")
        else:
            wrong = self.failed(name)
            what = f"{len(wrong)} check(s) failed" if wrong else f"{time.monotonic() - began:.1f} s"
            self._ended(name, "failed" if wrong else "passed", what)
        self.free()

    def _ended(self, name: str, state: str, what: str) -> None:
        self.sections[name] = {"state": state, "what": what}
        print(f"   {state}: {what}", flush=True)
        self.write()

    @property
    def passed(self) -> bool:
        """Whether every section of a whole run has run, and every check passed."""
        names = self.expected or tuple(self.sections)
        return bool(names) and all(self.section_passed(name) for name in names)

    def section_passed(self, name: str) -> bool:
        return self.sections.get(name, {}).get("state") == "passed"

    def out_of_time(self, what: str) -> bool:
        """Whether the budget is spent, inside a section: what is left out then is no pass."""
        if self.left > 0:
            return False
        return not self.check(f"{what} left out", 1.0, 0.0, "the budget is spent")

    def write(self) -> None:
        """``gpu_check.json`` and ``gpu_check.md`` as of now."""
        values = {
            "environment": self.environment, "passed": self.passed, "sections": self.sections, "checks": self.checks,
            "figures": self.figures,
        }  # fmt: skip
        (self.folder / "gpu_check.json").write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
        (self.folder / "gpu_check.md").write_text(self.table(), encoding="utf-8")

    def table(self) -> str:
        """Markdown: the environment, a line for each section, the checks that failed, the figures."""
        lines = [", ".join(f"{key} {value}" for key, value in self.environment.items()), ""]
        lines += ["| section | result | |", "| --- | --- | --- |"]
        lines += [f"| {name} | {found['state']} | {found['what']} |" for name, found in self.sections.items()]
        wrong = [check for check in self.checks if not check["passed"]]
        if wrong:
            lines += ["", "| failed check | value | at most |", "| --- | ---: | ---: |"]
            lines += [f"| {each['section']}: {each['name']} | {each['value']} | {each['limit']:g} |" for each in wrong]
        if self.figures:
            lines += ["", "| figure | |", "| --- | --- |"]
        for name, values in self.figures.items():
            lines.append(f"| {name} | {_shown(values)} |")
        return "\n".join(lines) + "\n"

    # ---- the device

    def synchronize(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def free(self) -> None:
        """Give back what a section held, after an error or out of memory too."""
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()

    def milliseconds(self, function: Callable[[], object], repeats: int, warm: int = 2) -> float:
        """Median time of a call."""
        for _ in range(1 if self.small else warm):
            function()
        self.synchronize()
        times = []
        for _ in range(1 if self.small else repeats):
            began = time.perf_counter()
            if self.cuda:
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                function()
                end.record()
                end.synchronize()
                times.append(start.elapsed_time(end))
            else:
                function()
                times.append(1e3 * (time.perf_counter() - began))
        return statistics.median(times)


def _shown(values: Mapping[str, Any]) -> str:
    parts = ((key, f"{value:.4g}" if isinstance(value, float) else value) for key, value in values.items())
    return ", ".join(f"{key} {value}" for key, value in parts)


def _json(value: Any) -> Any:
    """JSON has no NaN: null."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
