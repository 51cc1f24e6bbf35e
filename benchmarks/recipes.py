"""Held-out loss of base, LoRA, each TTT variant, and TTT with LoRA, fine-tuned alike at matched trainable parameters.

    python scripts/fetch_speech.py speech
    python benchmarks/recipes.py speech --out recipes [--steps 100] [--seeds 0]

Every row is a run of the packaged config ``train-cpu`` with the changes listed below: the same recordings in the same
order, the same number of steps, AdamW with one learning rate (chosen on the validation recordings for LoRA and TTT-MLP
alike). What is reported is the loss on the test recordings, from their beginning to their end. A row that is done is
kept in ``OUT/rows.json``, so the command goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from moshi_ttt import default_registry
from moshi_ttt.configs.settings import read_settings
from moshi_ttt.core.atomic import atomic_file
from moshi_ttt.data.encoding import encode
from moshi_ttt.training.logs import METRICS
from moshi_ttt.training.model import skeleton
from moshi_ttt.training.run import run

CONFIG = "train-cpu"
SPLITS = ("train", "valid", "test")
LINEAR = '[{variant: ttt_linear, layers: "1,2,3", chunk: 16}]'
MLP = '[{variant: ttt_mlp, layers: "1,3", chunk: 16}]'
DEEP = '[{variant: ttt_multilayer, layers: "1,3", chunk: 16, depth: 3, expansion: 2}]'
IN_PLACE = '[{variant: gating_mlp, layers: "1,2,3", chunk: 16, lr: 0.3, train_w_down: true}]'
ROWS: dict[str, list[str]] = {
    "base": ["ttt=[]", "lora.enable=true", "lora.rank=1", "optim.lr=0", "max_steps=1"],  # LoRA starts at zero
    "LoRA": ["ttt=[]", "lora.enable=true", "lora.rank=17"],
    "TTT-Linear": [f"ttt={LINEAR}"],
    "TTT-MLP": [f"ttt={MLP}"],
    "TTT multi-layer (3)": [f"ttt={DEEP}"],
    "in-place TTT": [f"ttt={IN_PLACE}"],
    "TTT-MLP + LoRA": ['ttt=[{variant: ttt_mlp, layers: "3", chunk: 16}]', "lora.enable=true", "lora.rank=8"],
    "in-place TTT + LoRA": [
        'ttt=[{variant: gating_mlp, layers: "1,2,3", chunk: 16, lr: 0.3}]', "lora.enable=true", "lora.rank=13",
    ],
}  # fmt: skip


def encoded(speech: Path, out: Path) -> dict[str, Path]:
    """The shards of each split, made if they are not there."""
    found = {}
    for split in SPLITS:
        found[split] = out / "encoded" / split
        if not found[split].is_dir():
            settings = read_settings(CONFIG, [f"data.train_data={speech / f'{split}.jsonl'}"], default_registry())
            encode(settings, found[split], Console(), held_out=False)
    return found


def train(name: str, seed: int, steps: int, shards: dict[str, Path], out: Path, split: str) -> dict[str, Any]:
    """One row: its figures."""
    registry = default_registry()
    folder = out / "runs" / f"{name} {seed}"
    changes = [
        f"max_steps={steps}", f"seed={seed}", f"data.train_data={shards['train']}", f"data.eval_data={shards[split]}",
        "eval_freq=0", "optim.lr=3e-3", "optim.lr_groups.gates=3e-2", "do_ckpt=false", "overwrite_run_dir=true",
        f"run_dir={folder}", *ROWS[name],
    ]  # fmt: skip
    settings = read_settings(CONFIG, changes, registry)
    groups = skeleton(settings, registry).groups()
    trained = sum(parameter.numel() for members in groups.values() for parameter in members.values())
    began = time.perf_counter()
    outcome = run(settings, registry, Console())
    losses = outcome.losses[outcome.step]
    logged = [json.loads(line) for line in (folder / METRICS).read_text(encoding="utf-8").splitlines()]
    steps_logged = [record for record in logged if record["kind"] == "train"]
    return {
        "name": name, "seed": seed, "parameters": 0 if name == "base" else trained, "split": split,
        "audio": losses.plain["audio"], "text": losses.plain["text"], "tokens": losses.terms, "steps": outcome.step,
        "first": steps_logged[0]["nats_audio"], "last": steps_logged[-1]["nats_audio"],
        "seconds": time.perf_counter() - began,
    }  # fmt: skip


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: means over seeds, and their range where there are several."""
    lines = ["| | trained parameters | audio (nats a token) | text (nats a token) |", "| --- | ---: | ---: | ---: |"]
    for name in ROWS:
        of = [row for row in rows if row["name"] == name]
        if of:
            cells = [_mean([row[part] for row in of]) for part in ("audio", "text")]
            lines.append(f"| {name} | {of[0]['parameters']:,} | {cells[0]} | {cells[1]} |")
    return "\n".join(lines)


def _mean(values: list[float]) -> str:
    mean = f"{sum(values) / len(values):.4f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.4f} to {max(values):.4f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("speech", type=Path, help="the folder that scripts/fetch_speech.py made")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--split", choices=("valid", "test"), default="test", help="recordings to report on")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    shards = encoded(arguments.speech, arguments.out)
    kept = arguments.out / "rows.json"
    rows: list[dict[str, Any]] = json.loads(kept.read_text(encoding="utf-8")) if kept.is_file() else []
    for seed in arguments.seeds:
        for name in ROWS:
            if any((row["name"], row["seed"], row["split"]) == (name, seed, arguments.split) for row in rows):
                continue
            print(f"== {name}, seed {seed}", flush=True)
            rows.append(train(name, seed, arguments.steps, shards, arguments.out, arguments.split))
            with atomic_file(kept) as temporary:
                temporary.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    text = table([row for row in rows if row["split"] == arguments.split])
    (arguments.out / "table.md").write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
