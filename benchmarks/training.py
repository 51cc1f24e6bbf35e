"""What TTT adds to a training step: time and memory beside the same LoRA training without it.

    OMP_NUM_THREADS=2 python benchmarks/training.py [--only "+ TTT-MLP in C++"] [--cpu-seconds] [--json FILE]

One Moshi of width 512 with 12 layers and random weights, float32, two segments of 30 s (375 frames), LoRA of rank 8 on
every linear layer, and one TTT block in the last layer: a twelfth of the layers, as three of 32 are about a tenth. Each
case has the defaults that a user gets, ``backend: auto`` among them; those in C++ ask for it by name, and the column
*backend* says what computed. A case makes whole optimizer steps, in turn with LoRA alone, and a ratio is between two
such steps. It does so in several rounds, each with new models of both: where a model lies in memory changes its time by
two or three percent. Memory is the most that a step allocates beyond what it found, by the allocator's events. The
gate: with its gate closed every block leaves the loss as it is, bit for bit, with checkpointing and without.
``--cpu-seconds`` counts the processor's time instead of the clock's, for a machine that does other work.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
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
Clock = Callable[[], float]
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


Case = tuple[str, bool]
"""A name of ``CASES``, and whether the layers are checkpointed."""


def first_loss(case: Case, runtime: Runtime) -> float:
    """What a new trainer of the case begins with."""
    name, checkpointing = case
    return trainer(CASES[name], checkpointing, runtime).make_step([batch()]).losses.total


def timed_pairs(case: Case, runtime: Runtime, steps: int, clock: Clock) -> tuple[Trainer, list[tuple[float, float]]]:
    """A new trainer of the case, and seconds of ``steps`` steps of LoRA alone, of a new trainer too, and of the case.

    They take turns, and the one or the other is first.
    """
    name, checkpointing = case
    made = [trainer(CASES[each], checkpointing, runtime) for each in ("LoRA", name)]
    for each in made:
        open_gates(each)
        each.make_step([batch()])
    found = []
    for count in range(steps):
        seconds = [0.0, 0.0]
        for which in (0, 1) if count % 2 else (1, 0):
            began = clock()
            made[which].make_step([batch()])
            seconds[which] = clock() - began
        found.append((seconds[0], seconds[1]))
    return made[1], found


def measured(case: Case, runtime: Runtime, arguments: argparse.Namespace) -> dict[str, Any]:
    """The row of a case, but for what compares its memory with that of another."""
    clock = time.process_time if arguments.cpu_seconds else time.perf_counter
    rounds, pairs = [], []
    for _ in range(arguments.rounds):
        made, found = timed_pairs(case, runtime, arguments.steps, clock)
        rounds.append(statistics.median(mine / plain for plain, mine in found))
        pairs += found
    ratios = [mine / plain for plain, mine in pairs]
    seconds = statistics.median(mine for _, mine in pairs)
    memory = allocated_peak(lambda: made.make_step([batch()]))
    return {
        "case": case[0], "backend": backends(made), "checkpointing": case[1], "ms": round(1_000 * seconds, 1),
        "frames_per_second": round(ROWS * FRAMES / seconds), "time / LoRA": round(statistics.median(ratios), 3),
        "of rounds": f"{min(rounds):.3f} to {max(rounds):.3f}", "MiB": round(memory / 2**20, 1),
        "parameters": sum(p.numel() for p in made.parameters),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="new models of a case and of LoRA beside it")
    parser.add_argument("--steps", type=int, default=4, help="timed steps of each in a round")
    parser.add_argument("--only", nargs="+", choices=list(CASES), default=list(CASES), help="cases, beside LoRA")
    parser.add_argument("--json", help="also write the figures to this file")
    parser.add_argument("--cpu-seconds", action="store_true", help="the processor's time instead of the clock's")
    arguments = parser.parse_args()
    names = [name for name in CASES if name == "LoRA" or name in arguments.only]
    cases = [(name, checkpointing) for checkpointing in (False, True) for name in names]
    with start("cpu", None) as runtime:
        losses = {case: first_loss(case, runtime) for case in cases}
        print(f"gate: the first loss of every case is {losses['LoRA', False]:.6f}")
        if len(set(losses.values())) != 1:
            sys.exit(f"The gate is red, and no time is printed: {losses}")
        rows: list[dict[str, Any]] = []
        plain: dict[bool, float] = {}  # of LoRA alone, by checkpointing, in MiB
        for case in cases:
            row = measured(case, runtime, arguments)
            row["memory / LoRA"] = round(row["MiB"] / plain.setdefault(case[1], row["MiB"]), 3)
            if not rows:
                print("| " + " | ".join(row) + " |\n|" + " --- |" * len(row))
            print("| " + " | ".join(str(value) for value in row.values()) + " |", flush=True)
            rows.append(row)
    if arguments.json:
        with open(arguments.json, "w", encoding="utf-8") as handle:
            json.dump({"torch": torch.__version__, "threads": torch.get_num_threads(), "rows": rows}, handle, indent=2)


if __name__ == "__main__":
    main()
