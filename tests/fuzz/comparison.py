"""How equal two sets of results are: all of them are compared before a case fails."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor


def error(actual: Tensor, expected: Tensor) -> float:
    """max |a - b| / max(1, max |b|), in float64: the design's measure. nan where either has one."""
    a, b = actual.detach().double(), expected.detach().double()
    return float((a - b).abs().max() / b.abs().max().clamp(min=1.0))


def differences(
    actual: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    bound: float,
    moved: Callable[[], Mapping[str, float]],
) -> list[str]:
    """What is wrong, the largest error first; empty where nothing is.

    ``moved``, asked only where the bound does not hold, is how far each result moves when all inputs move by an ulp.
    Where that comes near the bound, no arithmetic could keep it: the bound is then 30 times that movement.
    """
    problems = [f"{name} is on one side only" for name in sorted(actual.keys() ^ expected.keys())]
    wrong = []
    for name in sorted(actual.keys() & expected.keys()):
        a, b = actual[name], expected[name]
        if a.shape != b.shape:
            problems.append(f"{name}: shape {tuple(a.shape)}, by the definition {tuple(b.shape)}")
        elif not (found := error(a, b)) <= bound:
            wrong.append((found, name))
    movement = moved() if wrong else {}
    return problems + [
        f"{name}: error {found:.3g}, above {max(bound, 30 * movement[name]):.3g}"
        for found, name in sorted(wrong, reverse=True)
        if not found <= max(bound, 30 * movement[name])
    ]


def check(problems: list[str]) -> None:
    """Raises AssertionError where there are any."""
    assert not problems, "not what the definition says\n  " + "\n  ".join(problems)
