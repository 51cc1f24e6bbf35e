"""Sections about speed and memory; each is skipped where the results it would time are wrong.

A roofline fraction is the time that the arithmetic and the bytes need at the card's measured ceilings over the time
that was taken.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from moshi_ttt import default_registry, inject, parse_config
from moshi_ttt.configs.settings import parse_settings
from moshi_ttt.core.block import BlockContext
from moshi_ttt.core.sharding import local, shard
from moshi_ttt.hosts.moshi import lora
from moshi_ttt.hosts.moshi.host import MOSHI_HOST
from moshi_ttt.hosts.moshi.upstream import LMGen
from moshi_ttt.training.model import skeleton
from moshi_ttt.training.runtime import start
from moshi_ttt.training.trainer import Trainer

from .cases import batches, block_of
from .report import Report

WIDTHS = {"tiny": {"dim": 256, "heads": 4, "hidden": 704}, "7B": {"dim": 4096, "heads": 32, "hidden": 11264}}
SMALL = {"tiny": {"dim": 64, "heads": 2, "hidden": 96}}
TRAINED: dict[str, dict[str, Any]] = {
    "ttt_linear C32": {"variant": "ttt_linear", "chunk": 32}, "ttt_mlp C32": {"variant": "ttt_mlp", "chunk": 32},
    "ttt_multilayer C32": {"variant": "ttt_multilayer", "chunk": 32, "depth": 3},
    "ttt_ridge C16": {"variant": "ttt_ridge", "chunk": 16},
    "gating_mlp C256": {"variant": "gating_mlp", "chunk": 256, "target": "hidden_states"},
}  # fmt: skip
BIG = "builtin:moshi-7b"


def ceilings(report: Report) -> None:
    """What this card does: bytes a second, products, microseconds a launch."""
    values = {"copy GB/s": _copying(report, 1 << (16 if report.small else 28))}
    size = 256 if report.small else 8192
    for name, dtype, precision in (
        ("bfloat16", torch.bfloat16, "highest"), ("float32", torch.float32, "highest"), ("tf32", torch.float32, "high"),
    ):  # fmt: skip
        with _products(precision):
            a, b = (torch.randn(size, size, device=report.device, dtype=dtype) for _ in range(2))
            spent = report.milliseconds(lambda a=a, b=b: a @ b, 7)  # type: ignore[misc]
        values[f"{name} TFLOP/s"] = 2 * size**3 / spent / 1e9
    little = torch.zeros(8, device=report.device)
    report.synchronize()
    began = time.perf_counter()
    for _ in range(2000):
        little.add_(1)
    values["us a launch"] = (time.perf_counter() - began) / 2000 * 1e6
    report.figure("ceilings", **values)


def _copying(report: Report, count: int) -> float:
    """GB/s of a copy of ``count`` float32 numbers, which are read and written."""
    source, target = (torch.zeros(count, device=report.device) for _ in range(2))
    return 8 * count / report.milliseconds(lambda: target.copy_(source), 7) / 1e6


@contextmanager
def _products(precision: str) -> Iterator[None]:
    """Matrix products of float32 in this precision, as before afterwards."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _floor_ms(report: Report, products: float, inner: float, moved: float) -> float:
    """Milliseconds that bfloat16 products, float32 products (both in operations) and bytes need at the ceilings."""
    ceiling = report.figures["ceilings"]
    arithmetic = products / ceiling["bfloat16 TFLOP/s"] + inner / ceiling["float32 TFLOP/s"]
    return max(arithmetic / 1e9, moved / ceiling["copy GB/s"] / 1e6)


def training_of_a_block(report: Report) -> None:
    """Forward and backward of one block, 100 s of frames: time, launches, memory, fraction of the roofline."""
    frames = 70 if report.small else 1250
    for width, shape in (SMALL if report.small else WIDTHS).items():
        for name, full in TRAINED.items():
            entry = {**full, "chunk": 8} if report.small else full
            block = block_of(entry, report.device, torch.bfloat16, **shape)
            for batch in (1,) if report.small else (1, 4, 16):
                if report.left < 0.1 * report.budget:
                    report.check("block timings left out", 1.0, 0.0, "no time left")
                    return
                _time_block(report, f"train {width} {name} B{batch}", block, batch, frames, entry["chunk"])
            del block
            report.free()


def _time_block(report: Report, label: str, block: Any, batch: int, frames: int, chunk: int) -> None:
    dim = block.info.dim
    x = torch.randn(batch, frames, dim, device=report.device, dtype=torch.bfloat16, requires_grad=True)
    context = BlockContext(input_embeddings=x.detach(), want_state=False)

    def both() -> None:
        block.zero_grad(set_to_none=True)
        x.grad = None
        y, _ = block(x, None, context)
        y.backward(torch.ones_like(y))

    try:
        if report.cuda:
            torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated() if report.cuda else 0
        spent = report.milliseconds(both, 5)
        peak = (torch.cuda.max_memory_allocated() - held) / 2**30 if report.cuda else math.nan
    except torch.OutOfMemoryError:
        block.zero_grad(set_to_none=True)
        report.figure(label, result="out of memory")
        return
    tokens = batch * frames
    products, inner = _operations(block, chunk, frames)
    moved = 8 * tokens * dim * 2 + 2 * 4 * sum(parameter.numel() for parameter in block.parameters())
    floor = _floor_ms(report, 3 * tokens * products, 3 * tokens * inner, moved)
    values: dict[str, Any] = {
        "ms": spent, "frames/s": 1e3 * tokens / spent, "peak GiB": peak, "of the roofline %": 100 * floor / spent,
    }  # fmt: skip
    if report.cuda and batch == 1:
        values |= _kernels(both)
    report.figure(label, **values)


def _operations(block: Any, chunk: int, frames: int) -> tuple[float, float]:
    """Of one token forward: operations in products of the model's dtype, and of the inner loop in float32."""
    dim, heads = block.info.dim, block.info.num_heads
    if hasattr(block, "key_width"):  # ridge: projections, and what a token changes; a chunk's system is small beside it
        products = 2.0 * dim * block.heads * (block.key_width + 2 * block.value_width)
        return products, block.flops_per_token() - products
    weights = getattr(block, "fast_weight", None)
    if weights is None:  # in place: the MLP's three matrices; the Gram form reads half of the T x T scores, twice
        hidden = block.info.mlp.linear_out.in_features
        return 6.0 * dim * hidden, 2.0 * dim * dim + frames * (hidden + dim)
    widths = [weights[0].shape[1], *(weight.shape[2] for weight in weights)]
    inner = sum(
        (3 + (layer > 0)) * 2 * fan_in * fan_out + 2 * chunk * (fan_in + fan_out)
        for layer, (fan_in, fan_out) in enumerate(pairwise(widths))
    )
    return 8.0 * dim * dim, float(heads * inner)


def _kernels(call: Any) -> dict[str, Any]:
    """How many kernels a call launches, and how long they are busy."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as found:
        call()
        torch.cuda.synchronize()
    kernels = [event for event in found.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return {"launches": len(kernels), "busy ms": sum(event.time_range.elapsed_us() for event in kernels) / 1e3}


def fill(model: nn.Module, device: torch.device) -> None:
    """Random weights for a model made on the meta device, sharded or not."""
    generator = torch.Generator(device=device).manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            mine = local(parameter)
            if name.rpartition(".")[2] == "alpha":  # RMSNorm's scale
                mine.fill_(1.0)
            else:
                mine.normal_(0, 0.02, generator=generator)


def training_of_moshi(report: Report) -> None:
    """A training step of Moshi 7B (random weights) with LoRA of rank 64, without blocks and with three TTT-MLP."""
    layers = "1,2,3" if report.small else "29,30,31"
    cases: dict[str, list[Mapping[str, Any]]] = {
        "LoRA": [], "LoRA and 3 TTT-MLP": [{"variant": "ttt_mlp", "layers": layers, "chunk": 8 if report.small else 32}]
    }  # fmt: skip
    frames = 20 if report.small else 1250
    for label, entries in cases.items():
        settings = parse_settings(
            {
                "data": {"train_data": "none.jsonl"}, "run_dir": "none", "ttt": entries, "device": report.device.type,
                "host": {"name": "moshi", "hf_repo": "builtin:tiny" if report.small else BIG}, "optim": {"lr": 1e-6},
                "lora": {"enable": True, "rank": 4 if report.small else 64}, "max_steps": 100,
            },
            registry=default_registry(), where="gpu_check",
        )  # fmt: skip
        with start(report.device.type, None) as runtime:
            built = skeleton(settings, default_registry())
            shard(MOSHI_HOST, built.model, built.roles, runtime.mesh)
            built.model.to_empty(device=runtime.device)
            fill(built.model, runtime.device)
            lora.initialize_lora(built.model, 0)
            built.injection.initialize()
            built.model.train()
            trainer = Trainer(built, settings.run, runtime)
            for rows in (1,) if report.small else (1, 2, 8):
                _time_step(report, f"train Moshi, {label}, B{rows}", trainer, rows, frames)
            del trainer, built
        report.free()


def _time_step(report: Report, label: str, trainer: Trainer, rows: int, frames: int) -> None:
    data = batches(trainer.trained.model, 1, frames, rows)
    try:
        if report.cuda:
            torch.cuda.reset_peak_memory_stats()
        spent = report.milliseconds(lambda: trainer.make_step(data), 3, 1)
    except torch.OutOfMemoryError:
        trainer.trained.model.zero_grad(set_to_none=True)
        report.figure(label, result="out of memory")
        return
    peak = torch.cuda.max_memory_allocated() / 2**30 if report.cuda else math.nan
    embeddings = {id(p) for m in trainer.trained.model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    count = sum(p.numel() for p in trainer.trained.model.parameters() if id(p) not in embeddings)
    floor = _floor_ms(report, 6.0 * count * rows * frames, 0.0, 0.0)  # forward, again for backward, and to the inputs
    report.figure(
        label, **{"ms a step": spent, "frames/s": 1e3 * rows * frames / spent, "peak GiB": peak,
                  "of the roofline %": 100 * floor / spent},
    )  # fmt: skip


def decoding(report: Report) -> None:
    """LMGen with captured graphs at 7B width: the base, then with each variant; against reading it all once."""
    last, spread = ("1,2,3", "1,2") if report.small else ("29,30,31", "5,11,17,23,29")
    chunk = 8 if report.small else 32
    cases: dict[str, list[Mapping[str, Any]]] = {
        "base": [],
        "3 TTT-Linear": [{"variant": "ttt_linear", "layers": last, "chunk": chunk}],
        "3 TTT-MLP": [{"variant": "ttt_mlp", "layers": last, "chunk": chunk}],
        "3 TTT-Ridge": [{"variant": "ttt_ridge", "layers": last, "chunk": 8 if report.small else 16}],
        "5 in place": [
            {"variant": "gating_mlp", "layers": spread, "chunk": 8 if report.small else 256, "target": "hidden_states"}
        ],
    }
    host = {"name": "moshi", "hf_repo": "builtin:tiny" if report.small else BIG, "dtype": "bfloat16"}
    registry = default_registry()
    model = MOSHI_HOST.skeleton(MOSHI_HOST.config_class.model_validate(host))
    model.to_empty(device=report.device)
    fill(model, report.device)
    model.eval()
    for label, entries in cases.items():
        config = parse_config({"host": host, "ttt": entries}, registry=registry) if entries else None
        injection = None if config is None else inject(model, config)
        for rows in (1, 3) if report.small else (1, 8, 24):
            state = 0 if injection is None else injection.plan.state_bytes
            _time_decoding(report, f"decode {label} B{rows}", model, rows, rows * state)
            report.free()
        if injection is not None:
            injection.remove()


def _time_decoding(report: Report, label: str, model: Any, rows: int, state: int) -> None:
    codes = torch.zeros(rows, model.n_q - model.dep_q, 1, dtype=torch.long, device=report.device)
    generator = LMGen(model, use_sampling=True)
    try:
        with torch.no_grad(), generator.streaming(rows):
            for _ in range(4):
                generator.step(codes)
            spent = report.milliseconds(lambda: generator.step(codes), 40, 5)
    except torch.OutOfMemoryError:
        report.figure(label, result="out of memory")
        return
    tables = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    weights = sum(p.numel() * p.element_size() for p in model.parameters() if id(p) not in tables)
    cache = 2 * len(model.transformer.layers) * rows * model.context * model.dim * 2
    floor = _floor_ms(report, 0.0, 0.0, weights + cache + state)
    report.figure(
        label, **{"ms a frame": spent, "times real time": 80 / spent, "of the roofline %": 100 * floor / spent}
    )  # fmt: skip
