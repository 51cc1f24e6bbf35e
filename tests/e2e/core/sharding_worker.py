"""One of two ranks of test_sharding.py: heads sharded over the ranks."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from moshi_ttt.core.sharding import assign, placed_like, whole

HEADS, WIDTH = 6, 4


def main(out: Path) -> None:
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))
    weight = torch.randn(HEADS, WIDTH, WIDTH, generator=torch.Generator().manual_seed(0))
    x = torch.randn(HEADS, 3, WIDTH, generator=torch.Generator().manual_seed(1))
    found: dict[str, object] = {}

    sharded = distribute_tensor(weight, mesh, [Shard(0)]).requires_grad_()
    heads = sharded.to_local().shape[0]
    first = dist.get_rank() * heads
    local = torch.bmm(sharded.to_local(), sharded.to_local())  # what a rank computes of its own heads
    placed = placed_like(sharded, local)
    found["shape"], found["placements"] = list(placed.shape), str(placed.placements)
    found["equal"] = torch.equal(placed.full_tensor(), torch.bmm(weight, weight))
    (torch.bmm(x[first : first + heads], placed.to_local().transpose(1, 2))).sum().backward()
    reference = weight.clone().requires_grad_()
    torch.bmm(x, torch.bmm(reference, reference).transpose(1, 2)).sum().backward()
    found["gradient"] = float((sharded.grad.full_tensor() - reference.grad).abs().max())

    copied = distribute_tensor(weight, mesh, [Replicate()])
    found["replicated"] = torch.equal(placed_like(copied, 2 * weight).full_tensor(), 2 * weight)
    try:
        placed_like(sharded, weight)  # the whole where a rank's part belongs
    except ValueError as error:
        found["refused"] = str(error)
    uneven = distribute_tensor(torch.zeros(5, 2), mesh, [Shard(0)])
    part = torch.full_like(uneven.to_local(), 1.0 + dist.get_rank())
    found["uneven"] = placed_like(uneven, part).full_tensor()[:, 0].tolist()

    target = distribute_tensor(torch.zeros_like(weight), mesh, [Shard(0)])
    assign(target, weight)
    found["assigned"] = torch.equal(whole(target), weight)
    (out / f"rank{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
