#!/usr/bin/env python3
"""Compiles the Triton kernels for GPUs that are not there, and records what they take: registers, spills, memory.

    python scripts/kernel_resources.py            # compares with the recorded table, and says what differs
    python scripts/kernel_resources.py --write    # records it in plugins/hybrid/triton/resources.json

It needs Triton and no GPU. ``--only TEXT`` compiles the rows whose name has it, as in ``sm_90 linear`` or ``sm_90 step
of 2``. ``--missing`` compiles those that are not recorded too: they are of chains that ``auto`` does not take, and some
take minutes. ``--products bf16`` compiles training kernels with other products, none of which are recorded.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from table_in_page import TableInPage

ROOT = Path(__file__).resolve().parent.parent
TABLE = TableInPage("kernel resources", "kernel_resources.py")
TITLES = {"linear": "TTT-Linear", "mlp": "TTT-MLP", "around": "around the inner loop"}


def compiled(arch: int, compilation: Any) -> dict[str, int]:
    """Registers a thread, bytes a thread spills, bytes of shared memory and warps of a program."""
    import triton
    import triton.backends.nvidia
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(import_module(f"moshi_ttt.plugins.hybrid.triton.{compilation.module}"), compilation.kernel)
    names = kernel.arg_names
    constants = {name: value for name, value in compilation.constants.items() if name in names}
    types = {name: compilation.types.get(name, "*fp32") for name in names} | dict.fromkeys(constants, "constexpr")
    # As at run time: tensors begin at a multiple of 16 bytes, and the number of heads is a multiple of 16.
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, name in enumerate(names)
        if types[name][0] == "*" or (name == "H" and types[name] == "i32")
    }
    values = {(names.index(name),): value for name, value in constants.items()}
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
    return {
        "registers": int(numbers[1]), "spilled": int(numbers[2]), "shared": int(made.metadata.shared),
        "warps": compilation.warps,
    }  # fmt: skip


def rows(only: str = "", missing: bool = False, products: str = "tf32x3") -> Iterator[tuple[str, dict[str, int]]]:
    """The recorded rows whose name has ``only``, compiled now; with ``missing``, those that are not recorded too."""
    from moshi_ttt.plugins.hybrid.triton.resources import compilations, recorded

    for name, made in compilations(products).items():
        if only in name and (missing or name in recorded()):
            yield name, compiled(*made)


def differences(found: dict[str, dict[str, int]], recorded: dict[str, dict[str, int]]) -> list[str]:
    """A line for each row that is not as recorded."""
    return [
        f"{name}: {taken}, recorded: {recorded.get(name)}"
        for name, taken in found.items()
        if taken != recorded.get(name)
    ]


def table() -> str:
    """The table of docs/gpu.md: of each chain, the most that one of its kernels takes, and whether auto may take it."""
    from moshi_ttt.plugins.hybrid.triton.compilations import KERNELS, SHAPES
    from moshi_ttt.plugins.hybrid.triton.resources import LARGEST_SPILL, recorded, training_row, training_too_large

    lines = [
        "| | registers | bytes spilled | KiB shared | small enough for `auto` |",
        "| --- | ---: | ---: | ---: | --- |",
    ]
    for arch in LARGEST_SPILL:
        for kind, kernels in KERNELS.items():
            for chunk, width in SHAPES[kind]:
                names = [training_row(arch, kernel, chunk, width, "tf32x3") for kernel in kernels]
                if not set(names) <= set(recorded()):
                    continue
                found = [name for name in (*names, *(f"{name} continued" for name in names)) if name in recorded()]
                rows = [recorded()[name] for name in found]
                most = (max(r.registers for r in rows), max(r.spilled for r in rows), max(r.shared for r in rows))
                auto = "yes" if training_too_large(kind, chunk, width, "tf32x3", divmod(arch, 10)) is None else "no"
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
    parser.add_argument("--missing", action="store_true", help="compile rows that are not recorded too")
    parser.add_argument("--products", default="tf32x3", choices=("tf32x3", "tf32", "bf16"), help="of training kernels")
    options = parser.parse_args(given)
    if options.products != "tf32x3" and (options.write or not options.missing):
        parser.error(f"--products {options.products} is not recorded: give --missing, and do not give --write")
    sys.path.insert(0, str(ROOT / "src"))
    import triton

    from moshi_ttt.plugins.hybrid.triton.resources import RECORD, recorded

    record = json.loads(RECORD.read_text(encoding="utf-8"))
    found: dict[str, dict[str, int]] = {}
    for name, taken in rows(options.only, options.missing, options.products):
        found[name] = taken
        print(f"{name}: {taken}", flush=True)
    if options.products != "tf32x3":
        return 0
    if options.write:
        record = {"triton": triton.__version__, "kernels": dict(sorted((record["kernels"] | found).items()))}
        lines = [f"    {json.dumps(name)}: {json.dumps(taken)}" for name, taken in record["kernels"].items()]
        text = f'{{\n  "triton": {json.dumps(record["triton"])},\n  "kernels": {{\n' + ",\n".join(lines) + "\n  }\n}\n"
        RECORD.write_text(text, encoding="utf-8")
        recorded.cache_clear()
        TABLE.write(table())
        return 0
    wrong = differences(found, record["kernels"])
    print("\n".join(wrong) or f"{len(found)} rows are as recorded")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
