"""The errors of the package, read from its files: nothing is imported."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BASE = "MoshiTTTError"
FOLDERS = ("core", "plugins", "hosts", "system", "configs", "data", "training", "evaluation", "serving", "apps")


def errors() -> str:
    """A table: each error, what else it is, where it is defined, and what it means."""
    rows = [
        f"| `{name}` | {', '.join(f'`{base}`' for base in bases)} | `{module}` | {' '.join(said.split())} |"
        for name, (bases, module, said) in error_classes().items()
    ]
    return "\n".join(["| error | is also a | import from | when |", "| --- | --- | --- | --- |", *rows, ""])


def error_classes() -> dict[str, tuple[list[str], str, str]]:
    """Name of each error that a user can meet -> its bases, its module, and the first paragraph of its docstring."""
    defined: dict[str, tuple[list[str], str, str]] = {}
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            module = ".".join(("moshi_ttt", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__")
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.ClassDef) and node.name.endswith("Error"):
                    bases = [base.id for base in node.bases if isinstance(base, ast.Name)]
                    said = (ast.get_docstring(node) or "").partition("\n\n")[0]
                    defined[node.name] = (bases, module, said)
    return {name: entry for name, entry in defined.items() if _is_ours(name, defined)}


def _is_ours(name: str, defined: dict[str, tuple[list[str], str, str]]) -> bool:
    return name == BASE or (name in defined and any(_is_ours(base, defined) for base in defined[name][0]))
