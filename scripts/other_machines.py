"""Run the conformance suites as other machines would compute: with other instruction sets in PyTorch, MKL and oneDNN.

    python scripts/other_machines.py            # every switch that changes a result here
    python scripts/other_machines.py --list     # which switches those are

A switch that changes no bit of the probes below on this machine would repeat what was run already: it is listed as such
and not run, which is not a pass. Exit code 1 where a suite fails.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SUITES = (
    "tests/conformance/variants/test_conformance.py", "tests/conformance/variants/test_kit_mutations.py",
    "tests/conformance/moshi/test_conformance_on_moshi.py", "tests/conformance/moshi/test_stream_state.py",
    "tests/conformance/moshi/test_switches.py",
    "-k", "not test_options_of",
)  # fmt: skip
"""Options of the hybrid layers are left out: their arithmetic is that of the layers without them."""
EVERY = "not slow and not gpu and not full_size and not browser"
"""As `make test-full`: with the combinations that `make test` leaves out."""
SWITCHES: dict[str, dict[str, str]] = {
    "PyTorch without AVX-512": {"ATEN_CPU_CAPABILITY": "avx2"},
    "MKL with AVX2": {"MKL_ENABLE_INSTRUCTIONS": "AVX2"},
    "MKL with SSE4.2": {"MKL_ENABLE_INSTRUCTIONS": "SSE4_2"},
    "the oldest of each": {
        "ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "COMPATIBLE", "ONEDNN_MAX_CPU_ISA": "SSE41",
    },
}  # fmt: skip
"""What is run, by its name: the environment that makes a process compute otherwise."""
SINGLE: dict[str, dict[str, str]] = {
    "ATEN_CPU_CAPABILITY=default": {"ATEN_CPU_CAPABILITY": "default"},
    "MKL_CBWR=COMPATIBLE": {"MKL_CBWR": "COMPATIBLE"},
    "ONEDNN_MAX_CPU_ISA=SSE41": {"ONEDNN_MAX_CPU_ISA": "SSE41"},
}
"""The parts of the last one, listed alone so that each is seen to have an effect."""


def probes() -> dict[str, str]:
    """Name -> digest of the bits of a result, of operations that blocks are made of."""
    import torch
    from torch.nn import functional

    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    found = {}
    for dtype in (torch.float64, torch.float32):
        a, b = draw(37, 65).to(dtype), draw(65, 41).to(dtype)
        found |= {
            f"product {dtype}": a @ b, f"gelu {dtype}": functional.gelu(a, approximate="tanh"),
            f"softmax {dtype}": a.softmax(-1), f"LayerNorm {dtype}": functional.layer_norm(a, a.shape[-1:]),
        }  # fmt: skip
    large = draw(512, 1024).bfloat16(), draw(768, 1024).bfloat16()
    found["product torch.bfloat16"] = functional.linear(*large)
    found["convolution torch.float32"] = functional.conv1d(draw(4, 64, 200).float(), draw(64, 64, 5).float())
    # All zeros where a product does not depend on where in memory its factors start.
    row, weight = draw(1, 64).float(), draw(32, 64).float()
    moved = torch.empty(32 * 64 + 1)[1:].view(32, 64).copy_(weight)
    found["alignment torch.float32"] = functional.linear(row, moved) - functional.linear(row, weight)
    return {
        name.replace("torch.", ""): hashlib.sha256(
            bytes(value.contiguous().view(torch.uint8).flatten().tolist())
        ).hexdigest()
        for name, value in found.items()
    }


def probed(environment: dict[str, str]) -> dict[str, str]:
    """``probes`` in a process of its own with this environment."""
    command = [sys.executable, str(Path(__file__).resolve()), "--probe"]
    result = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=True)
    return dict(line.rsplit(" ", 1) for line in result.stdout.splitlines())


def effects() -> dict[str, list[str]]:
    """Switch -> the probes whose last bits it changes on this machine."""
    base = probed({})
    return {
        name: [probe for probe, digest in probed(environment).items() if digest != base[probe]]
        for name, environment in {**SWITCHES, **SINGLE}.items()
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--list", action="store_true", help="say which switches change a result, and stop")
    parser.add_argument("--probe", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("options", nargs="*", help="options for pytest, after --")
    options = parser.parse_args()
    if options.probe:
        print("\n".join(f"{name} {digest}" for name, digest in probes().items()))
        return 0
    found = effects()
    for name, changed in found.items():
        print(
            f"{name}: " + (f"changes {', '.join(changed)}" if changed else "changes nothing here, not run"), flush=True
        )
    useful = [name for name in SWITCHES if found[name]]
    if not useful:
        print("No switch changes a result on this machine: nothing was tried here. An x86-64 CPU is needed for that.")
        return 0
    if options.list:
        return 0
    failed = []
    for name in useful:
        print(f"\n== {name}: {' '.join(f'{key}={value}' for key, value in SWITCHES[name].items())}", flush=True)
        environment = os.environ | SWITCHES[name] | {"OMP_NUM_THREADS": "1"}
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-n",
            "auto",
            "--dist",
            "worksteal",
            "-m",
            EVERY,
            *SUITES,
            *options.options,
        ]
        if subprocess.run(command, cwd=ROOT, env=environment).returncode:
            failed.append(name)
    print(
        f"\n{len(useful) - len(failed)} of {len(useful)} instruction sets pass"
        + (f"; failed: {', '.join(failed)}" if failed else "")
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
