#!/usr/bin/env python3
"""Compiles the Triton kernels for GPUs that are not there, and records what they take: registers, spills, memory.

    python scripts/kernel_resources.py            # compares with the recorded table, and says what differs
    python scripts/kernel_resources.py --write    # records it in plugins/hybrid/triton/resources.json

It needs Triton and no GPU. ``--only TEXT`` compiles the rows whose name has it, as in ``sm_90 linear``.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).resolve().parent.parent / "src"
POINTERS_OF_INTEGERS = {"POSITION"}
NUMBERS = {"T", "H", "N", "BH", "CHUNK", "FIRST", "LAST"}


def compiled(kernel: Any, constants: dict[str, Any], arch: int, warps: int) -> dict[str, int]:
    """Registers a thread, bytes a thread spills, and bytes of shared memory a program takes."""
    import triton
    import triton.backends.nvidia
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    constants = {name: value for name, value in constants.items() if name in names}
    types = {name: "constexpr" if name in constants else "fp32" if name == "eps" else "*fp32" for name in names}
    types |= {name: "i32" for name in names if name in NUMBERS}
    # As at run time: tensors begin at a multiple of 16 bytes, and the number of heads is a multiple of 16.
    aligned = {
        (place,): [["tt.divisibility", 16]] for place, name in enumerate(names) if types[name][0] == "*" or name == "H"
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
