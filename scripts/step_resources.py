#!/usr/bin/env python3
"""Compiles the Triton kernels of a streamed step for GPUs that are not there, and records what they take.

    python scripts/step_resources.py            # compares with the record, and says what differs
    python scripts/step_resources.py --write    # records it in plugins/hybrid/triton/step_resources.json

It needs Triton and no GPU. ``--only TEXT`` compiles the rows whose name has it, as in ``sm_90 step of 2``.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from itertools import product
from pathlib import Path
from typing import Any

ARCHITECTURES, CHUNKS, WIDTHS, LAYERS = (80, 90, 100), (16, 32), (64, 128), (1, 2, 3)
TYPES = {
    "OK": "*i32", "NOW": "*i32", "ACTIVE": "*i1", "UPDATED": "*i1", "POSITION": "*i64", "SPOILED": "*i64",
    "SKIPPED": "*i64",
    **dict.fromkeys(("eps", "base_rate", "factor", "log2_theta", "limit", "volume"), "fp32"),
}  # fmt: skip
"""Of arguments that are no tensors of float32."""


def rows() -> dict[str, Any]:
    """Every launch that is recorded, by the name of its row: the architecture and the compilation."""
    from moshi_ttt.plugins.hybrid.triton.step_resources import compilations, row_name

    found = {}
    for arch, layers, chunk, width in product(ARCHITECTURES, LAYERS, CHUNKS, WIDTHS):
        for launch, compilation in compilations(layers, chunk, width).items():
            found[row_name(arch, layers, launch, chunk, width)] = (arch, compilation)
    return found


def compiled(arch: int, compilation: Any) -> dict[str, int]:
    """Registers a thread, bytes a thread spills, bytes of shared memory and warps of a program."""
    import triton
    import triton.backends.nvidia
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from moshi_ttt.plugins.hybrid.triton import step_kernels, step_surroundings

    kernel = getattr(step_kernels, compilation.kernel, None) or getattr(step_surroundings, compilation.kernel)
    names = kernel.arg_names
    types = {name: TYPES.get(name, "*bf16" if name in compilation.bfloat16 else "*fp32") for name in names}
    types |= dict.fromkeys(compilation.constants, "constexpr")
    # As at run time: tensors begin at a multiple of 16 bytes.
    aligned = {(place,): [["tt.divisibility", 16]] for place, name in enumerate(names) if types[name][0] == "*"}
    values = {(names.index(name),): value for name, value in compilation.constants.items()}
    source = ASTSource(kernel, signature=types, constexprs=values, attrs=aligned)
    options = {"num_warps": compilation.warps, "num_stages": 1}
    made = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        tool = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
        said = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    numbers = re.search(r"REG:(\d+) STACK:(\d+)", said.stdout)
    if numbers is None:
        raise RuntimeError(f"cuobjdump says no registers: {said.stdout[:300]}")
    shared = int(made.metadata.shared)
    return {
        "registers": int(numbers[1]), "spilled": int(numbers[2]), "shared": shared, "warps": compilation.warps
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="record what is found")
    parser.add_argument("--only", default="", help="rows whose name has this text")
    given = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    from gpu_checks.source_tree import make_importable

    make_importable()
    import triton

    from moshi_ttt.plugins.hybrid.triton.step_resources import RECORD

    record = json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.exists() else {"kernels": {}}
    found = {}
    for name, row in rows().items():
        if given.only in name:
            found[name] = compiled(*row)
            print(f"{name}: {found[name]}", flush=True)
    differ = {name: row for name, row in found.items() if record["kernels"].get(name) != row}
    if given.write:
        kernels = {**({} if not given.only else record["kernels"]), **found}
        text = ",\n".join(f"    {json.dumps(name)}: {json.dumps(row)}" for name, row in kernels.items())
        head = f'{{\n  "triton": {json.dumps(triton.__version__)},\n  "kernels": {{\n'
        RECORD.write_text(f"{head}{text}\n  }}\n}}\n", encoding="utf-8")
        return 0
    for name, row in differ.items():
        print(f"not as recorded: {name}: {row}, recorded {record['kernels'].get(name)}")
    print(f"{len(found)} rows, {len(differ)} of them not as recorded")
    return 1 if differ else 0


if __name__ == "__main__":
    sys.exit(main())
