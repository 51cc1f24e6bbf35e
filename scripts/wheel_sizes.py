"""What a wheel holds, by folder, as the table of docs/maintainers.md.

    python scripts/wheel_sizes.py dist/moshi_ttt-0.1.0-py3-none-any.whl

Sizes are those in the wheel, which is compressed, in MB of a million bytes.
"""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path
from zipfile import ZipFile

SMALL = 500_000
"""Folders of fewer bytes are one row together."""
OTHERS = "everything else"


def folder_sizes(wheel: Path) -> dict[str, int]:
    """Bytes in the wheel by folder, the largest first; small folders are ``OTHERS``, at the end."""
    sizes: Counter[str] = Counter()
    with ZipFile(wheel) as archive:
        for entry in archive.infolist():
            sizes[entry.filename.rpartition("/")[0]] += entry.compress_size
    large = {name: size for name, size in sizes.most_common() if size >= SMALL}
    return {**large, OTHERS: sum(sizes.values()) - sum(large.values())}


def table(sizes: dict[str, int]) -> list[str]:
    """The rows of a Markdown table, without the reasons."""
    rows = [f"| `{name}/` | {size / 1e6:.2f} | |" for name, size in sizes.items() if name != OTHERS]
    return ["| folder | MB | why |", "| --- | ---: | --- |", *rows, f"| {OTHERS} | {sizes[OTHERS] / 1e6:.2f} | |"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path)
    wheel = parser.parse_args().wheel
    print(f"{wheel.name}: {wheel.stat().st_size / 1e6:.2f} MB")
    print("\n".join(table(folder_sizes(wheel))))


if __name__ == "__main__":
    main()
