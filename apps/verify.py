"""``moshi-ttt verify``: compare every form of an operation with its reference vectors.

A file is safetensors: ``in.*`` inputs, ``out.*`` results, ``grad.X`` the gradient of sum(y * cotangent) with respect to
``in.X``; string metadata name the operation and its options. See ``docs/reference_vectors.md``.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text
from safetensors import SafetensorError
from torch import Tensor

from moshi_ttt.core.errors import ConfigError
from moshi_ttt.core.registry import Registry, default_registry
from moshi_ttt.core.tensor_files import read_tensors
from moshi_ttt.core.verification import Verifier, metadata_problems, tensor_problems

FLOAT32_TOLERANCE = 1e-4
CHECKSUMS = "SHA256SUMS"


@dataclass(frozen=True)
class Comparison:
    """One output or gradient of one verifier on one file.

    ``absolute`` is max|a-b|; ``error`` is max|a-b| / max(1, max|b|), which the tolerance bounds; ``relative`` is
    max|a-b| / max|b|.
    """

    file: Path
    verifier: str
    dtype: torch.dtype
    name: str
    absolute: float
    relative: float
    error: float
    tolerance: float

    @property
    def passed(self) -> bool:
        return self.error <= self.tolerance  # false for nan


@dataclass(frozen=True)
class FileReport:
    """All comparisons of one file. With ``problems`` the file is not what it should be, and nothing was compared;
    without either, no verifier takes it. ``left_out``: none of the backend that was asked for does, and others may.
    """

    file: Path
    metadata: Mapping[str, str]
    comparisons: tuple[Comparison, ...]
    problems: tuple[str, ...] = ()
    left_out: bool = False

    @property
    def passed(self) -> bool:
        return self.left_out or (
            not self.problems and bool(self.comparisons) and all(each.passed for each in self.comparisons)
        )


def expand(paths: Iterable[Path]) -> list[Path]:
    """Files as they are, folders as their ``*.safetensors``. Raises ConfigError for what does not exist or is empty."""
    files: list[Path] = []
    for path in paths:
        found = sorted(path.glob("*.safetensors")) if path.is_dir() else [path] if path.is_file() else []
        if not found:
            raise ConfigError(
                f"{path}: no such file, or a folder without .safetensors files. Give files of reference vectors, or a "
                "folder of them (docs/reference_vectors.md)."
            )
        files += found
    return files


def verify_file(path: Path, registry: Registry | None = None, backend: str | None = None) -> FileReport:
    """Run every verifier that takes the file, in float64 and float32.

    A file that lacks something its operation has, or has something else, is not compared: its report says what.

    Args:
        registry: where verifiers are looked up; the process's registry by default.
        backend: run those of this backend alone; None: all, but those whose code is built first.

    Raises:
        ConfigError: the file cannot be read, no verifier is of this backend, or it cannot be had here.
    """
    registry = registry or default_registry()
    tensors, metadata = _read(path)
    installed = list(zip(registry.names("verifier"), registry.verifiers(), strict=True))
    known = sorted({verifier.backend for _, verifier in installed if verifier.backend is not None})
    if backend is not None and backend not in known:
        raise ConfigError(f"No form of the backend {backend!r} is compared. Backends: {', '.join(known)}.")
    verifiers = [(name, verifier) for name, verifier in installed if verifier.operation == metadata["op"]]
    problems = list(_problems(path, tensors, metadata, [verifier for _, verifier in verifiers]))
    comparisons: list[Comparison] = []
    for name, verifier in verifiers if not problems else ():
        chosen = not verifier.builds if backend is None else verifier.backend == backend
        if chosen and verifier.takes(metadata, frozenset(tensors)):
            for dtype in verifier.dtypes:
                comparisons += _compare(path, name, verifier, tensors, metadata, dtype)
    left_out = backend is not None and not comparisons and not problems
    return FileReport(path, metadata, tuple(comparisons), tuple(problems), left_out)


def _problems(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], verifiers: Sequence[Verifier]
) -> Iterator[str]:
    """What is wrong with a file, before anything is computed from it; a checksum beside it sees every change."""
    yield from _checksum_problems(path)
    wrong: dict[str, None] = {}  # each once, in order: verifiers of one operation share its schema
    for verifier in verifiers:
        found = metadata_problems(verifier.metadata(), metadata)
        found = found or list(tensor_problems(verifier.schema(metadata, frozenset(tensors)), tensors))
        wrong |= dict.fromkeys(found)
    yield from wrong


def _checksum_problems(path: Path) -> Iterator[str]:
    """Whether the file is the one that ``SHA256SUMS`` in its folder (as ``sha256sum`` writes it) names, if it does."""
    try:
        lines = (path.parent / CHECKSUMS).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return
    except (OSError, UnicodeDecodeError) as error:
        yield f"{CHECKSUMS} beside it cannot be read: {error}"
        return
    for line in lines:
        digest, _, name = line.partition("  ")
        if name == path.name and digest != hashlib.sha256(path.read_bytes()).hexdigest():
            yield f"its checksum is not the one in {CHECKSUMS}: the file was changed or damaged"


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        tensors, metadata = read_tensors(path)
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{path} cannot be read as safetensors: {error}.") from None
    if "op" not in metadata:
        raise ConfigError(f"{path} is not a file of reference vectors: it has no metadata 'op'.")
    return tensors, metadata


def _compare(
    path: Path,
    name: str,
    verifier: Verifier,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    dtype: torch.dtype,
) -> list[Comparison]:
    tolerance = verifier.tolerance(metadata) if dtype == torch.float64 else FLOAT32_TOLERANCE
    inputs = {key.removeprefix("in."): t.to(dtype) for key, t in tensors.items() if key.startswith("in.")}
    cotangent = inputs.pop("cotangent")
    wanted = [key.removeprefix("grad.") for key in tensors if key.startswith("grad.")]
    differentiate = verifier.differentiable
    if differentiate:
        inputs = {key: t.clone().requires_grad_(key in wanted) for key, t in inputs.items()}
    outputs = verifier.run(inputs, metadata)
    produced: dict[str, Tensor | None] = {f"out.{key}": value for key, value in outputs.items()}
    if differentiate:
        (outputs["y"] * cotangent).sum().backward()
        for key in wanted:
            # No path to y, as from an update that nothing follows: the gradient is zero.
            grad = inputs[key].grad
            produced[f"grad.{key}"] = torch.zeros_like(inputs[key]) if grad is None else grad
    expected = {k: t for k, t in tensors.items() if k.startswith("out.") or (k.startswith("grad.") and differentiate)}
    return [
        _measure(path, name, dtype, key, produced.get(key), tensor, tolerance)
        for key, tensor in sorted(expected.items())
    ]


def _measure(
    path: Path, verifier: str, dtype: torch.dtype, name: str, actual: Tensor | None, expected: Tensor, tolerance: float
) -> Comparison:
    if actual is None or actual.shape != expected.shape:
        return Comparison(path, verifier, dtype, name, float("nan"), float("nan"), float("nan"), tolerance)
    absolute = float((actual.detach().double() - expected.double()).abs().max())
    largest = float(expected.abs().max())
    relative = absolute / largest if largest else absolute
    return Comparison(path, verifier, dtype, name, absolute, relative, absolute / max(1.0, largest), tolerance)


def render(report: FileReport, *, every: bool = False) -> RenderableType:
    """A table of one file: a line per verifier and dtype with its worst output, or all of them."""
    operation = ", ".join(f"{key} {value}" for key, value in sorted(report.metadata.items()))
    table = Table(title=report.file.name, caption=operation, title_justify="left", caption_justify="left")
    if report.problems:
        return Text.assemble(
            (f"{report.file.name}: ", "bold"), ("FAIL", "bold red"), f" {'; '.join(report.problems)}. See the format "
            "in docs/reference_vectors.md.",
        )  # fmt: skip
    if report.left_out:
        return Text.assemble((f"{report.file.name}: ", "bold"), "no form of this backend takes it.")
    if not report.comparisons:
        return Text.assemble(
            (f"{report.file.name}: ", "bold"), ("FAIL", "bold red"),
            f" no installed verifier takes it ({operation}). See `moshi-ttt plugins`.",
        )  # fmt: skip
    for heading in ("verifier", "dtype", "output" if every else "worst output"):
        table.add_column(heading, no_wrap=True)
    for heading in ("max abs", "max rel", "error", "tolerance"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("")
    for comparison in report.comparisons if every else worst(report.comparisons):
        table.add_row(
            comparison.verifier, str(comparison.dtype).removeprefix("torch."), comparison.name,
            *(f"{value:.1e}" for value in (comparison.absolute, comparison.relative, comparison.error)),
            f"{comparison.tolerance:.0e}",
            Text("PASS", style="green") if comparison.passed else Text("FAIL", style="bold red"),
        )  # fmt: skip
    return table


def worst(comparisons: Iterable[Comparison]) -> list[Comparison]:
    """Of each verifier and dtype the comparison nearest to, or furthest beyond, its tolerance."""
    found: dict[tuple[str, torch.dtype], Comparison] = {}
    for comparison in comparisons:
        key = comparison.verifier, comparison.dtype
        if key not in found or _badness(comparison) > _badness(found[key]):
            found[key] = comparison
    return list(found.values())


def summary(reports: Sequence[FileReport]) -> Text:
    """One line for all files."""
    comparisons = [comparison for report in reports for comparison in report.comparisons]
    left_out = sum(report.left_out for report in reports)
    reports = [report for report in reports if not report.left_out]
    good, damaged = sum(report.passed for report in reports), sum(bool(report.problems) for report in reports)
    untaken = sum(not report.comparisons and not report.problems for report in reports)
    text = (
        f"{good} of {len(reports)} files pass; "
        f"{sum(c.passed for c in comparisons)} of {len(comparisons)} comparisons within tolerance"
    )
    if damaged:
        text += f"; {damaged} not as their operation asks"
    if untaken:
        text += f"; {untaken} taken by no verifier"
    if left_out:
        text += f"; {left_out} more have no form of this backend"
    return Text(text + ". error = max|a-b| / max(1, max|b|).", style="green" if good == len(reports) > 0 else "red")


def _badness(comparison: Comparison) -> float:
    ratio = comparison.error / comparison.tolerance
    return math.inf if math.isnan(ratio) else ratio
