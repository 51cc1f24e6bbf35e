"""One rank of sharded training with all variants on the tiny Moshi, and the same in one process.

Each row of the batch is a forward pass of its own, on a rank or in the loop of the one process, so both run the same
kernels on the same shapes.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

os.environ.setdefault("NO_TORCH_COMPILE", "1")

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from moshi_ttt import default_registry, inject, parse_config
from moshi_ttt.core.precision import FP32_STATE
from moshi_ttt.core.sharding import shard
from moshi_ttt.hosts.moshi.host import MOSHI_HOST

STEPS, LENGTH = 4, 13
CONFIG = {
    "host": {"name": "moshi", "hf_repo": "builtin:tiny"},
    "precision": "fp32_state",
    "ttt": [
        {"variant": "ttt_linear", "layers": "1", "chunk": 4},
        {"variant": "ttt_multilayer", "layers": "2", "chunk": 4, "expansion": 1},
        {"variant": "ttt_mlp", "layers": "3", "chunk": 5, "checkpoint_chunks": 2},
        {"variant": "ttt_ridge", "layers": "0", "chunk": 4},
        {"variant": "gating_mlp", "layers": "1,2", "chunk": 4},
        {
            "variant": "gating_mlp", "layers": "3", "chunk": 4, "update": "ridge", "lr": 1.0, "learned_lr": True,
            "keys": "unit", "start": "next_frame", "success_gate": True,
        },
    ],
}  # fmt: skip
RIDGE = {
    **CONFIG,
    "ttt": [{"variant": "ttt_ridge", "layers": "1,2", "chunk": 4, "novelty": True, "checkpoint_chunks": 2}],
}
"""A backward pass that runs groups of chunks again, with parameters that are used inside them alone."""


def train(rows: list[int], *, sharded: bool, config: dict = CONFIG) -> dict:
    """Losses [step][row] and the dtypes of everything; a bfloat16 base, frozen, with the blocks trained."""
    config = parse_config(config, registry=default_registry())
    model = MOSHI_HOST.load(config.host)
    injection = inject(model, config)
    injection.freeze_base()
    if sharded:
        shard(MOSHI_HOST, model, FP32_STATE.roles(torch.bfloat16))
    optimizer = torch.optim.AdamW(injection.parameters(), lr=3e-3, eps=1e-6)
    codes = torch.randint(0, 128, (2, 17, LENGTH), generator=torch.Generator().manual_seed(0))
    losses, state_dtypes = [], set()
    for _ in range(STEPS):
        losses.append([])
        for row in rows:
            with MOSHI_HOST.carry(model) as carried:
                out = model(codes[row : row + 1])
            logits, target = out.logits[out.mask].float(), codes[row : row + 1, 1:9][out.mask]
            loss = torch.nn.functional.cross_entropy(logits, target)
            (loss / len(rows)).backward()
            losses[-1].append(float(loss.detach()))
            state_dtypes |= {str(t.dtype) for s in carried.blocks.values() for t in s.values() if t.is_floating_point()}
        optimizer.step()
        optimizer.zero_grad()
    own = {id(parameter) for parameter in injection.parameters()}
    return {
        "losses": losses,
        "state_dtypes": sorted(state_dtypes),
        "block_dtypes": sorted({str(parameter.dtype) for parameter in injection.parameters()}),
        "base_dtypes": sorted({str(p.dtype) for p in model.parameters() if id(p) not in own}),
        "final": {name: _whole(p).detach().flatten()[:32].tolist() for name, p in injection.named_parameters()},
    }


def filled(*, sharded: bool = False) -> dict:
    """Some values of every parameter of a model made on the meta device, sharded there, materialised and filled."""
    config = parse_config(CONFIG, registry=default_registry())
    weights = MOSHI_HOST.base_state_dict(MOSHI_HOST.load(config.host))
    model = MOSHI_HOST.skeleton(config.host)
    injection = inject(model, config)
    if sharded:
        shard(MOSHI_HOST, model, FP32_STATE.roles(torch.bfloat16))
    model.to_empty(device="cpu")
    MOSHI_HOST.load_base(model, weights)
    injection.initialize()
    injection.check_precision("materialised")
    return {name: _whole(p).detach().flatten()[:: p.numel() // 7 + 1].tolist() for name, p in model.named_parameters()}


def _whole(parameter: torch.Tensor) -> torch.Tensor:
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = [dist.get_rank()]
    result = {"all": train(rank, sharded=True), "ridge": train(rank, sharded=True, config=RIDGE)}
    result["meta"] = filled(sharded=True)
    (Path(sys.argv[1]) / f"rank{dist.get_rank()}.json").write_text(json.dumps(result))
    dist.destroy_process_group()
