#!/usr/bin/env python3
"""Compiles the Triton kernels for GPUs that are not there, and records what they take: registers, spills, memory.

    python scripts/kernel_resources.py            # compares with the recorded table, and says what differs
    python scripts/kernel_resources.py --write    # records it in plugins/hybrid/triton/resources.json

It needs Triton and no GPU. ``--only TEXT`` compiles the rows whose name has it, as in ``sm_90 linear``.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs" / "gpu.md"
BEGIN, END = "<!-- kernel resources: written by scripts/kernel_resources.py -->\n", "<!-- end of kernel resources -->\n"
ARCHITECTURES = (80, 90, 100)
SHAPES = {
    "linear": ((16, 64), (16, 128), (32, 64), (32, 128)), "mlp": ((16, 64), (16, 128)), "around": ((16, 64), (16, 128)),
}  # fmt: skip
"""Chunk sizes and head widths, of each chain of kernels: those that ``auto`` may take."""
TITLES = {"linear": "TTT-Linear", "mlp": "TTT-MLP", "around": "around the inner loop"}
CHANNELS = 4096
"""Of the host, for what is around the inner loop: those of Moshi 7B."""
NUMBERS = {"T", "H", "N", "BH", "CHUNK", "FIRST", "LAST", "SLOTS", "COUNT"}
FLOATS = {"eps", "limit", "base_rate", "factor", "log2_theta", "volume"}
POINTERS = {"FINITE": "*u8", "OK": "*u8", "UPDATED": "*u8", "POSITION": "*i64"}
"""Those to other numbers than float32."""


def compiled(kernel: Any, constants: dict[str, Any], arch: int, warps: int) -> dict[str, int]:
    """Registers a thread, bytes a thread spills, and bytes of shared memory a program takes."""
    import triton
    import triton.backends.nvidia
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    constants = {name: value for name, value in constants.items() if name in names}
    types = {name: "fp32" if name in FLOATS else POINTERS.get(name, "*fp32") for name in names}
    types |= {name: "i32" for name in names if name in NUMBERS} | dict.fromkeys(constants, "constexpr")
    # As at run time: tensors begin at a multiple of 16 bytes, and the number of heads is a multiple of 16.
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, name in enumerate(names)
        if types[name][0] == "*" or (name == "H" and types[name] == "i32")
    }
    values = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, signature=types, constexprs=values, attrs=aligned)
    options = {"num_warps": warps, "num_stages": 1}
    found = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(found.asm["cubin"])
        file.flush()
        tool = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
        said = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    numbers = re.search(r"REG:(\d+) STACK:(\d+)", said.stdout)
    if numbers is None:
        raise RuntimeError(f"cuobjdump says no registers: {said.stdout[:300]}")
    return {"registers": int(numbers[1]), "spilled": int(numbers[2]), "shared": int(found.metadata.shared)}


def rows(only: str = "") -> Iterator[tuple[str, dict[str, int]]]:
    """The rows of the record whose name has ``only``, compiled now."""
    from moshi_ttt.plugins.hybrid.triton import linear_kernels, mlp_backward, mlp_forward, train_surroundings
    from moshi_ttt.plugins.hybrid.triton.backend import settings_of
    from moshi_ttt.plugins.hybrid.triton.resources import KERNELS, row_name

    for arch in ARCHITECTURES:
        for kind, kernels in KERNELS.items():
            for chunk, width in SHAPES[kind]:
                for kernel in kernels:
                    name = row_name(arch, kernel, chunk, width, "tf32x3")
                    if only not in name:
                        continue
                    settings = settings_of(chunk, 1e-6, "tf32x3")
                    constants = {"C": chunk, "D": width, "S": settings.slice_width, "EVERY": settings.every}
                    constants |= {"PRECISION": settings.precision, "SLICES": 4 * width // settings.slice_width}
                    constants |= {"CAUSAL": True, "GIVEN": False}
                    if kind == "around":
                        constants |= around(kernel, width)
                    modules = (linear_kernels, mlp_forward, mlp_backward, train_surroundings)
                    module = next(m for m in modules if hasattr(m, kernel))
                    warps = settings.warps
                    yield name, compiled(getattr(module, kernel), constants, arch, warps) | {"warps": warps}


def around(kernel: str, width: int) -> dict[str, Any]:
    """The constants of a kernel around the inner loop, with heads of ``width``, of a call that continues a state."""
    from moshi_ttt.plugins.hybrid.triton.train_layer import EACH, GATED

    heads = CHANNELS // width
    return {
        "H": heads, "BH": heads, "EACH": EACH, "BT": 1, "ALL": True, "CONTINUED": True, "N": CHANNELS, "ONE": False,
        "BY_ROW": False, "BN": GATED if "gate" in kernel else CHANNELS,
    }  # fmt: skip


def differences(found: dict[str, dict[str, int]], recorded: dict[str, dict[str, int]]) -> list[str]:
    """A line for each row that is not as recorded."""
    return [
        f"{name}: {taken}, recorded: {recorded.get(name)}"
        for name, taken in found.items()
        if taken != recorded.get(name)
    ]


def table() -> str:
    """The table of docs/gpu.md: of each chain, the most that one of its kernels takes, and whether auto may take it."""
    from moshi_ttt.plugins.hybrid.triton.resources import KERNELS, recorded, row_name, too_large

    lines = [
        "| | registers | bytes spilled | KiB shared | small enough for `auto` |",
        "| --- | ---: | ---: | ---: | --- |",
    ]
    for arch in ARCHITECTURES:
        for kind, kernels in KERNELS.items():
            for chunk, width in SHAPES[kind]:
                taken = [recorded().get(row_name(arch, kernel, chunk, width, "tf32x3")) for kernel in kernels]
                rows = [each for each in taken if each is not None]
                if len(rows) < len(kernels):
                    continue
                most = (max(r.registers for r in rows), max(r.spilled for r in rows), max(r.shared for r in rows))
                auto = "yes" if too_large(kind, chunk, width, "tf32x3", divmod(arch, 10)) is None else "no"
                of_chunk = "" if kind == "around" else f" chunk {chunk},"
                lines.append(
                    f"| sm_{arch}, {TITLES[kind]},{of_chunk} heads of {width} | {most[0]} | {most[1]:,} | "
                    f"{most[2] / 1024:.0f} | {auto} |"
                )
    return "\n".join(lines) + "\n"


def main(given: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", action="store_true", help="record what is found")
    parser.add_argument("--only", default="", help="compile the rows whose name has this")
    options = parser.parse_args(given)
    sys.path.insert(0, str(ROOT / "src"))
    import triton

    from moshi_ttt.plugins.hybrid.triton.resources import RECORD

    record = json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.exists() else {"kernels": {}}
    found: dict[str, dict[str, int]] = {}
    for name, taken in rows(options.only):
        found[name] = taken
        print(f"{name}: {taken}", flush=True)
    if options.write:
        record = {"triton": triton.__version__, "kernels": dict(sorted((record["kernels"] | found).items()))}
        lines = [f"    {json.dumps(name)}: {json.dumps(taken)}" for name, taken in record["kernels"].items()]
        text = f'{{\n  "triton": {json.dumps(record["triton"])},\n  "kernels": {{\n' + ",\n".join(lines) + "\n  }\n}\n"
        RECORD.write_text(text, encoding="utf-8")
        before, _, rest = DOCS.read_text(encoding="utf-8").partition(BEGIN)
        DOCS.write_text(before + BEGIN + table() + END + rest.partition(END)[2], encoding="utf-8")
        return 0
    wrong = differences(found, record["kernels"])
    print("\n".join(wrong) or f"{len(found)} rows are as recorded")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
