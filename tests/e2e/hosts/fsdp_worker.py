"""One rank of the sharded training run in test_fsdp.py, and the same run in one process.

The reference runs each rank's row in a forward pass of its own, so that both runs call the same kernels on the same
shapes; what is left is the order in which gradients are added.
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

sys.path.insert(0, str(Path(__file__).parents[2] / "unit" / "hosts"))

import toy

from moshi_ttt.core.errors import HostError
from moshi_ttt.core.precision import FP32_STATE
from moshi_ttt.core.sharding import shard
from moshi_ttt.hosts.moshi.host import MOSHI_HOST

STEPS, ROWS, SEGMENT = 3, 2, 10


def build() -> torch.nn.Module:
    model = toy.random_tiny_lm(dtype=torch.bfloat16, gradient_checkpointing=True).requires_grad_(False)
    MOSHI_HOST.attach(model, toy.make_blocks(model, block=toy.EmbeddingToyBlock))
    return model


def train(model: torch.nn.Module, rows: list[int]) -> tuple[list[list[float]], set[str]]:
    """Losses [step][row], and the dtypes of all carried states. Every step carries state over two segments."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=3e-3, eps=1e-6)
    codes = toy.random_codes(model, ROWS, STEPS * 2 * SEGMENT)
    losses, dtypes = [], set()
    for step in range(STEPS):
        row_losses = []
        for row in rows:
            with MOSHI_HOST.carry(model) as carried:
                for segment in range(2):
                    start = (2 * step + segment) * SEGMENT
                    piece = codes[row : row + 1, :, start : start + SEGMENT]
                    if segment == 0:
                        out = model(piece)
                        text, audio = out.text_logits[out.text_mask], out.logits[out.mask]
                    else:
                        text, audio = model.forward_text(piece)[1], torch.zeros(1)
                    loss = (text.float().square().mean() + audio.float().square().mean()) / len(rows)
                    loss.backward()
                    row_losses.append(float(loss.detach()) * len(rows))
                dtypes |= {str(t.dtype) for s in carried.blocks.values() for t in s.values() if t.is_floating_point()}
        optimizer.step()
        optimizer.zero_grad()
        losses.append(row_losses)
    return losses, dtypes


def root_gradients(sharded: bool, rows: list[int]) -> dict[str, list[float]]:
    """Gradients of base parameters that lie in no layer, when they are trained too; through the model's own forward."""
    model = toy.random_tiny_lm(dtype=torch.bfloat16).requires_grad_(False)
    MOSHI_HOST.attach(model, toy.make_blocks(model))
    trained = {name: model.get_parameter(name) for name in ("text_linear.weight", "linears.2.weight", "emb.1.weight")}
    for parameter in trained.values():
        parameter.requires_grad_(True)
    if sharded:
        shard(MOSHI_HOST, model, FP32_STATE.roles(torch.bfloat16))
    codes = toy.random_codes(model, ROWS, SEGMENT)
    for row in rows:
        out = model(codes[row : row + 1])
        loss = out.text_logits[out.text_mask].float().square().mean() + out.logits[out.mask].float().square().mean()
        (loss / len(rows)).backward()
    return {name: whole(model.get_parameter(name).grad).float().flatten().tolist() for name in trained}


def whole(parameter: torch.Tensor) -> torch.Tensor:
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter


def report(model: torch.nn.Module, losses: list[list[float]], dtypes: set[str]) -> dict:
    blocks = MOSHI_HOST.blocks(model)
    return {
        "losses": losses,
        "carried_dtypes": sorted(dtypes),
        "seen_dtypes": sorted({str(dtype) for block in blocks.values() for dtype in block.seen}),
        "parameters": sum(whole(p).numel() for p in model.parameters()),
        "final": {
            f"{site}.{name}": whole(p).detach().flatten()[:32].tolist()
            for site, block in blocks.items()
            for name, p in block.named_parameters()
        },
    }


def refusals(model: torch.nn.Module) -> dict[str, str]:
    found = {}
    for name, call in {
        "stream": lambda: model.streaming(1),
        "detach": lambda: MOSHI_HOST.detach(model),
        "shard": lambda: shard(MOSHI_HOST, model, FP32_STATE.roles(torch.bfloat16)),
        "load_base": lambda: MOSHI_HOST.load_base(model, {}),
    }.items():
        try:
            call()
        except HostError as error:
            found[name] = str(error)
    return found


def main(out: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    model = build()
    shard(MOSHI_HOST, model, FP32_STATE.roles(torch.bfloat16))
    placed = {type(p).__name__ for p in model.parameters()}
    stored = sorted({str(p.dtype) for block in MOSHI_HOST.blocks(model).values() for p in block.parameters()})
    losses, dtypes = train(model, [dist.get_rank()])
    result = report(model, losses, dtypes) | {
        "placed": sorted(placed),
        "stored": stored,
        "frozen_gradients": sum(p.grad is not None for p in model.parameters() if not p.requires_grad),
        "refusals": refusals(model),
        "digest": MOSHI_HOST.fingerprint(model)["weights"],
        "root_gradients": root_gradients(True, [dist.get_rank()]),
    }
    (out / f"rank{dist.get_rank()}.json").write_text(json.dumps(result))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
