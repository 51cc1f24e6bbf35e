"""The tile that the training kernels run with, measured on the GPU at first use and kept on disk (``tune``).

Candidates are the tiles of ``tiles_of`` whose kernels fit by the record of what they take. The first use costs the
compilation of each candidate's kernels, which cannot be stopped: no further candidate is begun after ``MOST_SECONDS``.

A choice is a file of its own in the user's cache folder. It appears whole or not at all, so processes need not wait
for each other: the last one's choice is kept. Every candidate gives the same results up to rounding.

Shape legend: B rows, T tokens, H heads, D head width, F hidden width, C tokens a chunk.
"""

from __future__ import annotations

import functools
import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from moshi_ttt.core.atomic import atomic_file
from moshi_ttt.plugins.common.backends import log_once
from moshi_ttt.plugins.common.native import cache_folder
from moshi_ttt.plugins.hybrid.triton.compilations import EXPANSION
from moshi_ttt.plugins.hybrid.triton.resources import training_too_large
from moshi_ttt.plugins.hybrid.triton.train_settings import Products, Tile, settings_of, tile_of, tiles_of

MOST_SECONDS = 30.0
"""After which no further candidate is begun."""
CHUNKS, REPEATS = 8, 5
"""Chunks of a row in a call that is measured, and how often it is measured."""


@dataclass(frozen=True, kw_only=True)
class TunedCalls:
    """What a tile is chosen for: a GPU, a version of Triton, a hash of the kernels' sources, and a shape.

    ``widths`` are those of the fast network's layers, input and output included; ``rows`` is a power of two.
    """

    gpu: str
    triton: str
    sources: str
    chunk: int
    widths: tuple[int, ...]
    heads: int
    rows: int
    products: Products

    @property
    def kind(self) -> str:
        return "linear" if len(self.widths) == 2 else "mlp"

    def file(self, folder: Path) -> Path:
        named = json.dumps(asdict(self), sort_keys=True)
        return folder / f"{hashlib.sha256(named.encode()).hexdigest()[:20]}.json"


def calls_of(
    device: torch.device, chunk: int, widths: tuple[int, ...], heads: int, rows: int, products: Products
) -> TunedCalls:
    """Of calls on a GPU."""
    import triton

    return TunedCalls(
        gpu=torch.cuda.get_device_name(device), triton=triton.__version__, sources=sources(), chunk=chunk,
        widths=widths, heads=heads, rows=1 << (rows - 1).bit_length(), products=products,
    )  # fmt: skip


@functools.cache
def tile_on(
    device: torch.device, chunk: int, widths: tuple[int, ...], heads: int, rows: int, products: Products
) -> Tile:
    """The tile for calls on a GPU, found once in a process: a call and its repetition have the same."""
    from triton.errors import TritonError

    calls = calls_of(device, chunk, widths, heads, rows, products)
    tiles = candidates(calls, torch.cuda.get_device_capability(device))
    failures = (RuntimeError, TritonError)  # no memory, or no room for the kernel on this GPU
    return chosen_tile(
        calls, tiles, lambda tile: seconds_of(partial(drawn_call(calls, device), tile), device), failures=failures
    )


def candidates(calls: TunedCalls, capability: tuple[int, int]) -> tuple[Tile, ...]:
    """Tiles whose kernels are recorded to fit, ``tile_of`` first; that alone where nothing is recorded."""
    first, width = tile_of(calls.chunk), calls.widths[0]
    if calls.kind == "mlp" and calls.widths[1] != EXPANSION * width:
        return (first,)
    given = (calls.kind, calls.chunk, width, calls.products, capability)
    fitting = tuple(tile for tile in tiles_of(calls.chunk) if training_too_large(*given, tile) is None)
    return fitting if first in fitting else (first,)


def chosen_tile(
    calls: TunedCalls, tiles: Sequence[Tile], measure: Callable[[Tile], float], *, folder: Path | None = None,
    clock: Callable[[], float] = time.monotonic, failures: tuple[type[Exception], ...] = (RuntimeError,),
) -> Tile:  # fmt: skip
    """The tile that was found before, or the fastest of ``tiles`` now.

    Args:
        measure: the seconds of a call with a tile.
        folder: of the files; None: the user's cache folder (XDG_CACHE_HOME moves it).
        clock: seconds.
        failures: errors of ``measure`` that leave a tile out; not the first one, which serves without tuning.
    """
    if len(tiles) == 1:
        log_once(
            f"{calls.kind}, chunk {calls.chunk}, heads of {calls.widths[0]}, {calls.products}: tune has nothing to "
            "measure, for no other tile is recorded to fit this GPU"
        )
        return tiles[0]
    file = calls.file(cache_folder() / "triton-tiles" if folder is None else folder)
    if (kept := _read(file, calls, tiles)) is not None:
        return kept
    begin, found = clock(), dict[Tile, float]()
    for tile in tiles:
        if found and clock() - begin > MOST_SECONDS:
            log_once(f"{calls.kind}, chunk {calls.chunk}: {len(found)} of {len(tiles)} tiles measured; time is up")
            break
        try:
            found[tile] = measure(tile)
        except failures as error:
            if not found:
                raise
            log_once(f"{calls.kind}, chunk {calls.chunk}: {tile} is left out: {type(error).__name__}: {error}")
    fastest = min(found, key=lambda tile: found[tile])
    _write(file, calls, fastest, found)
    return fastest


def _read(file: Path, calls: TunedCalls, tiles: Sequence[Tile]) -> Tile | None:
    """What a file chooses of ``tiles``, or None."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        if found["calls"] != json.loads(json.dumps(asdict(calls))):
            raise ValueError("it is of other calls")
        return tiles[tiles.index(Tile(**found["tile"]))]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        log_once(f"{file} is ignored and written anew: {type(error).__name__}: {error}")
        return None


def _write(file: Path, calls: TunedCalls, tile: Tile, seconds: Mapping[Tile, float]) -> None:
    times = [{**asdict(each), "seconds": value} for each, value in seconds.items()]
    text = json.dumps({"calls": asdict(calls), "tile": asdict(tile), "measured": times}, indent=1)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(file) as written:
            written.write_text(text, encoding="utf-8")
    except OSError as error:
        log_once(f"the choice of {tile} cannot be kept: {error}; it is measured again by the next process")


@functools.cache
def sources() -> str:
    """A hash of every kernel, and of the code that launches them."""
    texts = [path.read_text(encoding="utf-8") for path in sorted(Path(__file__).parent.glob("*.py"))]
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16]


def drawn_call(calls: TunedCalls, device: torch.device) -> Callable[[Tile], list[Tensor]]:
    """A function of a tile: both passes over the inner loop of drawn tokens, outside of autograd."""
    from moshi_ttt.plugins.hybrid.triton.train_layer import chunks_of

    generator, size, widths = torch.Generator(device).manual_seed(0), calls.chunk, calls.widths

    def drawn(*shape: int, scale: float = 1.0) -> Tensor:
        return scale * torch.randn(calls.rows, *shape, generator=generator, device=device)

    *tokens, dy = (drawn(CHUNKS * size, calls.heads, widths[0]) for _ in range(4))
    tokens.append(drawn(CHUNKS * size, calls.heads, scale=0.01))
    ones = torch.ones(calls.heads, widths[0], device=device)
    small = ones, torch.zeros_like(ones), ones.new_full((size,), 1 / size), ones.new_full((calls.rows, CHUNKS), 0.1)
    shapes = [shape for pair in pairwise(widths) for shape in (pair, (1, pair[1]))]
    fast = tuple(drawn(calls.heads, *shape, scale=0.02) for shape in shapes)

    def run(tile: Tile) -> list[Tensor]:
        settings = settings_of(size, 1e-6, calls.products, tile=tile)
        chunks = chunks_of(tokens[0].shape, fast, settings)
        y, end, kept = chunks.forward(tokens, small, fast)
        d_end = [torch.zeros_like(each) for each in end]
        found = chunks.backward(tokens, small, fast, kept, dy, d_end)
        return [y, *end, *(each for part in found for each in part)]

    return run


def seconds_of(run: Callable[[], object], device: torch.device) -> float:
    """The least of ``REPEATS`` on a GPU, after a first one, which compiles the kernels."""
    found = []
    for _ in range(1 + REPEATS):
        torch.cuda.synchronize(device)
        begin = time.perf_counter()
        run()
        torch.cuda.synchronize(device)
        found.append(time.perf_counter() - begin)
    return min(found[1:])
