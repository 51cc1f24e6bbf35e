"""What TTT adds to a training step: time and memory beside the same LoRA training without it.

    OMP_NUM_THREADS=2 python benchmarks/training.py [--steps 8] [--cpu-seconds] [--json FILE]

One Moshi of width 512 with 12 layers and random weights, float32, two segments of 30 s (375 frames), LoRA of rank 8 on
every linear layer, and one TTT block in the last layer: a twelfth of the layers, as three of 32 are about a tenth. Each
case has the defaults that a user gets, ``backend: auto`` among them; those in C++ ask for it by name, and the column
*backend* says what computed. Each case makes a whole optimizer step in turn, so ratios are between steps of one run;
memory is the most that a step allocates beyond what it found, by the allocator's events. The gate: with its gate closed
every block leaves the loss as it is, bit for bit, with checkpointing and without. ``--cpu-seconds`` counts the
processor's time instead of the clock's, for a machine that does other work.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from typing import Any

import torch
from bench.measure import allocated_peak

from moshi_ttt import default_registry, make_plan
from moshi_ttt.configs.settings import parse_settings
from moshi_ttt.core.sharding import shard
from moshi_ttt.data.dataset import CodesBatch
from moshi_ttt.hosts.moshi.depformer import make_steps_contiguous
from moshi_ttt.hosts.moshi.host import MOSHI_HOST
from moshi_ttt.hosts.moshi.lora import add_lora, initialize_lora
from moshi_ttt.hosts.moshi.tiny import random_tiny_lm
from moshi_ttt.plugins.hybrid.with_backends import BlockWithBackends
from moshi_ttt.training.model import choose_trained, losses_of
from moshi_ttt.training.runtime import Runtime, start
from moshi_ttt.training.trained import TrainedModel
from moshi_ttt.training.trainer import Trainer

LAYERS, FRAMES, ROWS = 12, 375, 2
CLOSED = {"gate": {"init": 0.0}}
IN_CPP = {"backend": {"train": "cpp"}}
CASES: dict[str, dict[str, Any] | None] = {
    "LoRA": None,
    "+ TTT-Linear": {"variant": "ttt_linear", "chunk": 32, **CLOSED},
    "+ TTT-MLP": {"variant": "ttt_mlp", "chunk": 32, **CLOSED},
    "+ TTT-Linear in C++": {"variant": "ttt_linear", "chunk": 32, **CLOSED, **IN_CPP},
    "+ TTT-MLP in C++": {"variant": "ttt_mlp", "chunk": 32, **CLOSED, **IN_CPP},
    "+ TTT multi-layer (3)": {"variant": "ttt_multilayer", "chunk": 32, "depth": 3, **CLOSED},
    "+ in-place TTT": {"variant": "gating_mlp", "chunk": 128},
}


def trainer(
    block: dict[str, Any] | None, checkpointing: bool, runtime: Runtime, *, dim: int = 512, layers: int = LAYERS
) -> Trainer:
    """A new trainer of the case, its gates closed."""
    registry = default_registry()
    entries = [] if block is None else [{**block, "layers": str(layers - 1)}]
    settings = parse_settings(
        {
            "data": {"train_data": "none"}, "run_dir": "none", "moshi_paths": {"hf_repo_id": "builtin:tiny"},
            "param_dtype": "float32", "batch_size": ROWS, "lora": {"enable": True, "rank": 8}, "ttt": entries,
            "gradient_checkpointing": checkpointing,
        },
        registry=registry, where="benchmark",
    )  # fmt: skip
    model: Any = random_tiny_lm(
        dim=dim, num_layers=layers, num_heads=8, card=128, text_card=512, depformer_dim=128, context=250,
        gradient_checkpointing=checkpointing,
    )  # fmt: skip
    add_lora(model, rank=8, scaling=2.0)
    initialize_lora(model, 0)
    policy = registry.policy("fp32_state")
    plan = make_plan(model, MOSHI_HOST, settings.ttt.ttt, policy=policy, registry=registry)
    trained = TrainedModel(model, plan.apply(model), policy.roles(torch.float32), losses_of(settings.run))
    choose_trained(trained, full=False, embeddings=False)
    make_steps_contiguous(model)
    shard(MOSHI_HOST, model, trained.roles, runtime.mesh)
    model.train()
    return Trainer(trained, settings.run, runtime)


def open_gates(made: Trainer) -> None:
    with torch.no_grad():
        for block in made.trained.injection.blocks.values():
            for gate in block.gate_parameters():
                gate.fill_(0.05)


def batch(frames: int = FRAMES) -> CodesBatch:
    codes = torch.randint(0, 128, (ROWS, 17, frames), generator=torch.Generator().manual_seed(0))
    return CodesBatch(codes, torch.arange(ROWS), ())


def backends(made: Trainer) -> str:
    """What computed the training calls of the blocks that have a choice, such as ``torch``; ``-`` where none has."""
    blocks = made.trained.injection.blocks.values()
    found = {name for block in blocks if isinstance(block, BlockWithBackends)
             for name in block.backends_in_use().get("train", ())}  # fmt: skip
    return ", ".join(sorted(found)) or "-"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--json", help="also write the figures to this file")
    parser.add_argument("--cpu-seconds", action="store_true", help="the processor's time instead of the clock's")
    arguments = parser.parse_args()
    clock = time.process_time if arguments.cpu_seconds else time.perf_counter
    with start("cpu", None) as runtime:
        made = {(name, ckpt): trainer(block, ckpt, runtime) for ckpt in (False, True) for name, block in CASES.items()}
        losses = {key: each.make_step([batch()]).losses.total for key, each in made.items()}
        print(f"gate: the first loss of every case is {losses['LoRA', False]:.6f}")
        if len(set(losses.values())) != 1:
            sys.exit(f"The gate is red, and no time is printed: {losses}")
        times: dict[tuple[str, bool], list[float]] = {key: [] for key in made}
        for each in made.values():
            open_gates(each)
        for count in range(arguments.steps + 1):
            for key, each in made.items():
                began = clock()
                each.make_step([batch()])
                if count:
                    times[key].append(clock() - began)
        rows = []
        plain = {ckpt: times["LoRA", ckpt] for ckpt in (False, True)}
        memory = {key: allocated_peak(lambda each=each: each.make_step([batch()])) for key, each in made.items()}
        for (name, ckpt), taken in times.items():
            ratio = statistics.median(mine / other for mine, other in zip(taken, plain[ckpt], strict=True))
            rows.append({
                "case": name, "backend": backends(made[name, ckpt]), "checkpointing": ckpt,
                "ms": round(1_000 * statistics.median(taken), 1),
                "frames_per_second": round(ROWS * FRAMES / statistics.median(taken)), "time / LoRA": round(ratio, 3),
                "MiB": round(memory[name, ckpt] / 2**20, 1),
                "memory / LoRA": round(memory[name, ckpt] / memory["LoRA", ckpt], 3),
                "parameters": sum(p.numel() for p in made[name, ckpt].parameters),
            })  # fmt: skip
        print("| " + " | ".join(rows[0]) + " |\n|" + " --- |" * len(rows[0]))
        for row in rows:
            print("| " + " | ".join(str(value) for value in row.values()) + " |")
    if arguments.json:
        with open(arguments.json, "w", encoding="utf-8") as handle:
            json.dump({"torch": torch.__version__, "threads": torch.get_num_threads(), "rows": rows}, handle, indent=2)


if __name__ == "__main__":
    main()
