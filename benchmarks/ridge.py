"""What the least-squares memory costs: beside a layer of Moshi 7B's width, and beside TTT-MLP. Behind a gate.

    python benchmarks/ridge.py [--device cuda] [--rows 1 8] [--tokens 256] [--chunks 12] [--only streaming]
                               [--json FILE]

One layer of Moshi (attention and gated MLP, width 4096, 32 heads, hidden width 11264) and one block at that width, 32
heads of 128, each called in turn. On a CPU the least-squares memory streams twice: by tensor operations (``torch``) and
by the C++ step (``cpp``), which ``backend: auto`` takes where it can. Training: forward and backward over ``--tokens``
tokens a row. Streaming: one token at a time over ``--chunks`` chunks of 16, so that borders of chunks are among the
steps; the 99th percentile over the median says whether one of them waits. float32 on a CPU, a bfloat16 host on CUDA.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from moshi.modules.transformer import StreamingTransformer
from torch import nn

from moshi_ttt import default_registry
from moshi_ttt.core.block import BlockContext, SequenceBlock, Site, SiteInfo, SiteKind
from moshi_ttt.core.config_parsing import parse_block
from moshi_ttt.core.format import SequenceFormat
from moshi_ttt.core.precision import FP32_STATE
from moshi_ttt.plugins.common.backends import BackendName
from moshi_ttt.plugins.ttt_ridge.naive import naive_layer

DIM, HEADS, HIDDEN, CONTEXT = 4096, 32, 11264, 3000
BLOCKS: dict[str, dict[str, Any]] = {
    "ttt_ridge": {"variant": "ttt_ridge", "chunk": 16},
    "ttt_ridge, relu2, keys of 256": {"variant": "ttt_ridge", "chunk": 16, "features": "relu2", "key_width": 256},
    "ttt_mlp": {"variant": "ttt_mlp", "chunk": 16},
}
STEPS: tuple[BackendName, ...] = ("torch", "cpp")
"""The backends of the streamed step of ``ttt_ridge``."""


def block_of(entry: dict[str, Any], dim: int, heads: int, device: str, dtype: torch.dtype) -> SequenceBlock:
    registry = default_registry()
    info = SiteInfo(
        site=Site(0, SiteKind.SEQUENCE), dim=dim, num_heads=heads, device=torch.device(device), dtype=dtype,
        format=SequenceFormat(),
    )  # fmt: skip
    config = parse_block(entry, registry=registry)
    block = registry.block(config.variant).factory(config, info, FP32_STATE.roles(dtype))
    block.reset_parameters(torch.Generator().manual_seed(0))
    return block


def gate(backends: Sequence[BackendName] = STEPS) -> float:
    """Largest float64 error of a call and of a stream, by each of ``backends``, against the definition."""
    block: Any = block_of({"variant": "ttt_ridge", "chunk": 4, "heads": 2}, 16, 2, "cpu", torch.float64)
    x = torch.randn(2, 23, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weights = dict(block.named_parameters())
    expected = naive_layer(x, x, weights, heads=2, chunk_size=4)
    found = [block(x, None, BlockContext(input_embeddings=x))[0]]
    for backend in backends:
        block.use_backend("step", backend)
        state = block.allocate_state(2)
        steps = [block.step(token, state, BlockContext(input_embeddings=token)) for token in x.split(1, 1)]
        found.append(torch.cat(steps, 1))
    return max(float((each - expected).detach().abs().max()) for each in found)


def by_backend(blocks: dict[str, SequenceBlock], device: str) -> dict[str, SequenceBlock]:
    """The blocks that stream: on a CPU one of ``ttt_ridge`` for each of its steps, with the same parameters."""
    found: dict[str, SequenceBlock] = {}
    for name, block in blocks.items():
        if device != "cpu" or block.config.variant != "ttt_ridge":
            found[name] = block
            continue
        for backend in STEPS:
            other: Any = block_of({**BLOCKS[name], "backend": backend}, DIM, HEADS, device, block.info.dtype)
            other.load_state_dict(block.state_dict(), assign=True)
            found[f"{name}, {backend}"] = other
    return found


def layer_of(device: str, dtype: torch.dtype) -> nn.Module:
    """One layer of Moshi's transformer."""
    return StreamingTransformer(
        d_model=DIM, num_heads=HEADS, num_layers=1, dim_feedforward=4 * HIDDEN * 3 // 8, causal=True, context=CONTEXT,
        gating="silu", norm="rms_norm_f32", positional_embedding="rope", device=device, dtype=dtype,
    )  # fmt: skip


def timed(calls: dict[str, Callable[[int], object]], repeats: int, warm: int, device: str) -> dict[str, list[float]]:
    """Milliseconds of each call, taking turns."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for count in range(repeats + warm):
        for name, call in calls.items():
            _synchronize(device)
            began = time.perf_counter()
            call(count)
            _synchronize(device)
            if count >= warm:
                times[name].append(1_000 * (time.perf_counter() - began))
    return times


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def training(
    layer: nn.Module, blocks: dict[str, SequenceBlock], rows: int, tokens: int, device: str, dtype: torch.dtype
) -> list[dict[str, Any]]:
    x = torch.randn(rows, tokens, DIM, device=device, dtype=dtype, requires_grad=True)
    context = BlockContext(input_embeddings=x.detach(), want_state=False)
    calls: dict[str, Callable[[int], object]] = {"layer": lambda _: layer(x).sum().backward()}
    for name, block in blocks.items():
        calls[name] = lambda _, block=block: block(x, None, context)[0].sum().backward()
    times = timed(calls, 5, 2, device)
    plain = statistics.median(times["layer"])
    return [
        {
            "what": f"training, B {rows}, {tokens} tokens", "case": name, "ms": round(statistics.median(each), 2),
            "beside the layer": round(statistics.median(each) / plain, 2),
        }
        for name, each in times.items()
    ]  # fmt: skip


@torch.no_grad()
def streaming(
    layer: Any, blocks: dict[str, SequenceBlock], rows: int, chunks: int, device: str, dtype: torch.dtype
) -> list[dict[str, Any]]:
    blocks = by_backend(blocks, device)
    inputs = torch.randn(64, rows, 1, DIM, device=device, dtype=dtype)
    contexts = [BlockContext(input_embeddings=x) for x in inputs]
    states = {name: block.allocate_state(rows) for name, block in blocks.items()}
    calls: dict[str, Callable[[int], object]] = {"layer": lambda t: layer(inputs[t % 64])}
    for name, block in blocks.items():
        calls[name] = lambda t, block=block, state=states[name]: block.step(inputs[t % 64], state, contexts[t % 64])
    with layer.streaming(rows):
        times = timed(calls, 16 * chunks, 16, device)
    plain, found = statistics.median(times["layer"]), []
    for name, each in times.items():
        middle = statistics.median(each)
        state = blocks[name].state_bytes() / 2**20 if name in blocks else 0.0
        found.append({
            "what": f"a streamed step, B {rows}", "case": name, "ms": round(middle, 3),
            "beside the layer": round(middle / plain, 2),
            "p99 / median": round(statistics.quantiles(each, n=100)[98] / middle, 2), "state, MiB": round(state, 2),
        })  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--tokens", type=int, default=256, help="of a row in training")
    parser.add_argument("--chunks", type=int, default=12, help="that are streamed")
    parser.add_argument("--only", choices=("training", "streaming"), help="measure one of the two")
    parser.add_argument("--json", help="also write the figures to this file")
    arguments = parser.parse_args()
    error = gate(STEPS if arguments.device == "cpu" else ("torch",))
    print(f"gate: largest float64 error against the definition {error:.1e}")
    if not error < 1e-10:
        sys.exit("The gate is red, and no time is printed.")
    device, dtype = arguments.device, torch.bfloat16 if arguments.device == "cuda" else torch.float32
    layer = layer_of(device, dtype)
    blocks = {name: block_of(entry, DIM, HEADS, device, dtype) for name, entry in BLOCKS.items()}
    figures = []
    for rows in arguments.rows:
        measured = []
        if arguments.only != "streaming":
            measured += training(layer, blocks, rows, arguments.tokens, device, dtype)
        if arguments.only != "training":
            measured += streaming(layer, blocks, rows, arguments.chunks, device, dtype)
        for row in measured:
            print("  ".join(f"{name} {value}" for name, value in row.items()), flush=True)
        figures += measured
    if arguments.json:
        where = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} threads"
        with open(arguments.json, "w", encoding="utf-8") as handle:
            json.dump({"torch": torch.__version__, "device": where, "rows": figures}, handle, indent=2)


if __name__ == "__main__":
    main()
