#!/usr/bin/env python3
"""Does moshi-ttt work on this GPU, and how fast is it? One NVIDIA GPU, about 8 minutes, no network.

    PYTHONPATH=src python scripts/gpu_check.py --out gpu-check       # on the GPU
    python scripts/gpu_check.py --device cpu --small --out try       # its logic, on a CPU

Needs torch 2.9 to 2.11, moshi (``--no-deps`` is enough) and what pyproject.toml lists beside it; the package itself
need not be installed. The sections are independent. One that fails is reported and the others go on; one that is
skipped, because the budget is spent or a section it needs is red, is not a pass. Exit code 0 when every section passed,
else 1.

Moshi's own torch.compile is on, as for anyone on CUDA; --no-moshi-compile turns it off. docs/gpu.md says what each
section shows.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from gpu_checks.source_tree import make_importable

SECTIONS = {
    # name: (module, function, seconds on a GPU, sections whose failure makes it meaningless)
    "blocks": ("blocks", "against_float64", 50, ()),
    "captured step": ("blocks", "captured_step", 40, ()),
    "generation": ("generation", "with_and_without_graphs", 90, ()),
    "slots": ("slots", "alone_and_together", 60, ()),
    "step 0": ("generation", "step_zero", 40, ()),
    "training": ("training", "training_and_resume", 100, ()),
    "ceilings": ("speed", "ceilings", 15, ()),
    "speed of blocks": ("speed", "training_of_a_block", 60, ("blocks", "ceilings")),
    "training kernels": ("kernels", "training_kernels", 120, ()),
    "decode kernels": ("steps", "decode_kernels", 60, ()),
    "speed of decoding": ("speed", "decoding", 80, ("captured step", "generation", "decode kernels", "ceilings")),
    "speed of slots": ("slots", "speed_of_slots", 60, ("slots", "ceilings")),
    "speed of training": ("speed", "training_of_moshi", 90, ("blocks", "ceilings")),
}


def arguments(given: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("gpu-check"), help="folder of gpu_check.json and gpu_check.md")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="small shapes: to try this script")
    parser.add_argument("--budget", type=float, default=480.0, help="seconds for everything (default: %(default)g)")
    parser.add_argument("--only", action="append", choices=list(SECTIONS), help="this section, and what it needs")
    parser.add_argument("--no-moshi-compile", action="store_true", help="turn Moshi's own torch.compile off")
    return parser.parse_args(given)


def _with_needs(names: list[str]) -> set[str]:
    """The sections, and those that they need."""
    return {*names, *(needed for name in names for needed in SECTIONS[name][3])}


def main(given: list[str] | None = None) -> int:
    options = arguments(given)
    # Before Moshi is imported: it decides then. On a CPU its compile takes longer than all of this.
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # the runs are deterministic; before CUDA starts
    if options.device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
    if options.no_moshi_compile or options.device == "cpu":
        os.environ["NO_TORCH_COMPILE"] = "1"
    make_importable()
    import importlib

    import torch
    from gpu_checks.report import Report

    if options.device == "cuda" and not torch.cuda.is_available():
        print("There is no CUDA device here. Give --device cpu --small to try the script itself.", file=sys.stderr)
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda", 0) if options.device == "cuda" else torch.device("cpu")
    report = Report(options.out, device, options.small, options.budget, expected=tuple(SECTIONS))
    chosen = _with_needs(options.only or list(SECTIONS))
    report.environment = {
        "device": torch.cuda.get_device_name() if report.cuda else platform.machine(), "torch": torch.__version__,
        "CUDA": torch.version.cuda or "none", "Python": platform.python_version(),
        "Moshi's compile": "off" if os.environ.get("NO_TORCH_COMPILE") else "on", "small": options.small,
    }  # fmt: skip
    print(", ".join(f"{key} {value}" for key, value in report.environment.items()), flush=True)
    for name, (module, function, seconds, needs) in SECTIONS.items():
        if name not in chosen:
            continue
        section = getattr(importlib.import_module(f"gpu_checks.{module}"), function)
        report.run(name, 1.0 if options.small else seconds, section, needs)
    print("\n" + report.table())
    if options.only and all(report.section_passed(name) for name in chosen):
        print(f"passed, of these sections alone: {', '.join(name for name in SECTIONS if name in chosen)}")
        return 0
    print("passed" if report.passed else "NOT passed")
    return 0 if report.passed else 1


if __name__ == "__main__":
    sys.exit(main())
