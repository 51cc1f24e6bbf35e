"""All benchmarks at small sizes: correctness, ratios of processor time with their spread, peak memory, scaling.

    python benchmarks/run.py [--only inner-loop scaling] [--out bench-run]
    python benchmarks/run.py --check              # compare with benchmarks/baseline.json
    python benchmarks/run.py --write-baseline     # on a quiet machine

Every suite begins with its correctness gate. A red gate ends the run with exit code 1, and no time is printed.
Ratios are between forms that take turns in this run. ``--check`` ends with exit code 1 where a ratio is more than 20 %
larger than the baseline's. A ratio that is too large is measured once more before it counts. Exit code 2 means that
there is no baseline to compare with.
"""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from bench import check, report
from bench.measure import Comparison, Gate, Measured, Spread, measure
from bench.suites import SIZES, SUITES

from moshi_ttt.core.errors import MoshiTTTError
from moshi_ttt.system.output_folder import check_free, new_folder

BASELINE = Path(__file__).with_name("baseline.json")
MADE_BY = "benchmarks/run.py"
EXIT_FAILED, EXIT_REFUSED = 1, 2
CPUINFO = Path("/proc/cpuinfo")


class GateError(Exception):
    """A check of correctness failed: nothing may be timed."""


def passed(gates: Sequence[Gate]) -> list[Gate]:
    """``gates``, printed. Raises GateError where one has failed."""
    for gate in gates:
        print(f"gate: {gate.name}: {gate.error:.1e}, allowed below {gate.tolerance:.0e}", flush=True)
    if red := [gate.name for gate in gates if not gate.passed]:
        raise GateError(f"The gate is red, and no time is printed: {'; '.join(red)}. Make the forms equal first.")
    return list(gates)


def run_suites(
    names: Sequence[str], size: str, rounds: int, stored: Mapping[str, Spread]
) -> tuple[list[Gate], list[Measured]]:
    """Open each suite, check its gates, and measure its comparisons; once more where a ratio exceeds ``stored``."""
    gates: list[Gate] = []
    results: list[Measured] = []
    for name in names:
        with SUITES[name](SIZES[size]) as (checked, comparisons):
            gates += passed(checked)
            for comparison in comparisons():
                found = measured(comparison, rounds)
                known = {name: spread for name, spread in found.named().items() if name in stored}
                if check.problems(known, stored, complete=False):
                    print("A ratio is larger than the baseline's; measured once more:", flush=True)
                    found = measured(comparison, rounds)
                results.append(found)
    return gates, results


def measured(comparison: Comparison, rounds: int) -> Measured:
    """The comparison, measured and printed."""
    found = measure(comparison, rounds=rounds)
    for ratio, spread in found.named().items():
        print(f"{ratio}  {spread.median:.3f} ({spread.low:.3f} to {spread.high:.3f})", flush=True)
    return found


def processor() -> str:
    """Its name."""
    if CPUINFO.is_file():
        lines = CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines()
        for line in lines:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def verdict(ratios: Mapping[str, Spread], stored: Mapping[str, Spread], *, complete: bool) -> int:
    """Print what differs from the baseline; the exit code."""
    found = check.problems(ratios, stored, complete=complete)
    for line in [*found, *check.faster(ratios, stored)]:
        print(line)
    if found:
        print(f"{len(found)} ratio(s) differ from the baseline.")
        return EXIT_FAILED
    print(f"{len(ratios)} ratios are at most {check.TOLERANCE:.0%} larger than the baseline's.")
    return 0


def arguments_of(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=SUITES, help="suites to run (default: all)")
    parser.add_argument("--size", choices=SIZES, default="small", help="of the problems; smoke is for tests")
    parser.add_argument("--threads", type=int, default=1, help="of torch (default: 1)")
    parser.add_argument("--rounds", type=int, default=15, help="turns of each form (default: 15)")
    parser.add_argument("--out", type=Path, help="folder for metrics.json, report.md and figures (default: none)")
    parser.add_argument("--overwrite", action="store_true", help="replace --out if this program made it")
    parser.add_argument("--baseline", type=Path, default=BASELINE, help="file (default: benchmarks/baseline.json)")
    after = parser.add_mutually_exclusive_group()
    after.add_argument("--check", action="store_true", help="fail where a ratio is 20 %% larger than the baseline's")
    after.add_argument("--write-baseline", action="store_true", help="store the ratios of this run")
    arguments = parser.parse_args(given)
    if arguments.write_baseline and arguments.only:
        parser.error("--write-baseline stores all ratios; leave --only out.")
    return arguments


def main(given: Sequence[str] | None = None) -> int:
    arguments = arguments_of(given)
    torch.set_num_threads(arguments.threads)
    setting = check.Setting(
        size=arguments.size, threads=arguments.threads, machine=processor(), torch=torch.__version__
    )  # fmt: skip
    try:
        if arguments.out is not None:
            check_free(arguments.out, made_by=MADE_BY, overwrite=arguments.overwrite)
        stored: dict[str, Spread] = {}
        if arguments.check:
            then, stored = check.read_baseline(arguments.baseline)
            check.refuse_other_setting(setting, then)
            if then.machine != setting.machine:
                print(f"The baseline was measured on another processor, {then.machine}; ratios may differ for that.")
        gates, results = run_suites(arguments.only or list(SUITES), arguments.size, arguments.rounds, stored)
    except GateError as error:
        print(error)
        return EXIT_FAILED
    except (check.BaselineError, MoshiTTTError) as error:
        print(error)
        return EXIT_REFUSED
    ratios = {name: spread for each in results for name, spread in each.named().items()}
    if arguments.out is not None:
        with new_folder(arguments.out, made_by=MADE_BY, overwrite=arguments.overwrite) as folder:
            report.write(folder, setting, gates, results)
        print(f"Written: {arguments.out}")
    if arguments.write_baseline:
        check.write_baseline(arguments.baseline, setting, ratios)
        print(f"Written: {arguments.baseline}, {len(ratios)} ratios")
    return verdict(ratios, stored, complete=not arguments.only) if arguments.check else 0


if __name__ == "__main__":
    sys.exit(main())
