#!/usr/bin/env python3
"""Train the memory that ships with the tiny Moshi: ttt_ridge in three layers, on prompts in three languages.

    for voice in en es fr it ru; do
      python scripts/fetch_speech.py voices/prompts-$voice --corpus prompts --language $voice
    done
    python scripts/train_tiny_memory.py --out memory --known voices/prompts-{en,es,fr} --unseen voices/prompts-{it,ru}

The base model is frozen. Segments of 15 s: clips of 7.7 s presented twice, most with their frames in random order,
and recordings from beginning to end. Nothing is trained on the unseen recordings, and nothing is chosen by them: at the
end recall and the cost on speech heard once are measured there, in memory/recall and memory/context. What is done stays
done: the same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

from study.jobs import Job, run_jobs
from study.material import presented_twice, shuffled_twice

CONFIG, CLIP, FRAME_RATE = "train-cpu", 96, 12.5
BLOCKS = '[{variant: ttt_ridge, layers: "1,2,3", chunk: 16}]'
WEIGHTS = {"shuffled": 0.4, "twice": 0.2, "encoded": 0.1}
"""How often a segment is drawn from each kind of material: a recording is some forty times as long as a clip."""
STEPS, BATCH = 300, 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for everything that is made")
    parser.add_argument("--known", type=Path, nargs="+", required=True, help="folders of speech to train on")
    parser.add_argument("--unseen", type=Path, nargs="+", required=True, help="folders of speech to measure on")
    arguments = parser.parse_args()
    out: Path = arguments.out
    encode(out, arguments.known, arguments.unseen)
    adapter = train(out)
    measure(out, adapter)
    print(f"adapter: {adapter}")


def run(out: Path, *jobs: Job) -> None:
    run_jobs(jobs, out / "logs", at_once=1, say=print)


def encode(out: Path, known: Sequence[Path], unseen: Sequence[Path]) -> None:
    """The recordings' tokens, and the clips made of those that are trained on."""
    sources = {split: [folder / f"{split}.jsonl" for folder in known] for split in ("train", "valid")}
    sources["unseen"] = [folder / f"{split}.jsonl" for folder in unseen for split in ("train", "valid", "test")]
    for name, paths in sources.items():
        listed = ",".join(map(str, paths))
        options = (f"duration_sec={2 * CLIP / FRAME_RATE}", "data.transcripts=optional", f"data.train_data={listed}")
        place = out / "encoded" / name
        run(out, Job(name=f"encode {name}", arguments=("encode", CONFIG, "--out", str(place), *options), result=place))
    for split, step in (("train", CLIP // 2), ("valid", CLIP)):
        if not (place := out / "twice" / split).exists():
            presented_twice(out / "encoded" / split, place, frames=CLIP, step=step)
        if not (place := out / "shuffled" / split).exists():
            shuffled_twice(out / "encoded" / split, place, frames=CLIP, step=step, seed=0)


def train(out: Path) -> Path:
    """The trained adapter's folder."""
    material = ",".join(f"{out / kind / 'train'}:{weight}" for kind, weight in WEIGHTS.items())
    heard = ",".join(str(out / kind / "valid") for kind in ("shuffled", "twice"))
    checkpoint = out / "run" / "checkpoints" / f"checkpoint_{STEPS:06d}"
    options = (
        f"run_dir={out / 'run'}", "resume=true", f"max_steps={STEPS}", "eval_freq=0", f"ckpt_freq={STEPS // 3}",
        "num_ckpt_keep=1", f"batch_size={BATCH}", f"duration_sec={2 * CLIP / FRAME_RATE}", "carry_state=true",
        "data.transcripts=optional", "device=cpu", f"ttt={BLOCKS}", "optim.lr=3e-3", "optim.lr_groups.gates=3e-2",
        f"data.train_data={material}", f"data.eval_data={heard}",
    )  # fmt: skip
    run(out, Job(name="train", arguments=("train", CONFIG, *options), result=checkpoint))
    return checkpoint / "adapter"


def measure(out: Path, adapter: Path) -> None:
    """Recall, and loss by position, on recordings that nothing was trained on."""
    common = (str(out / "run" / "args.yaml"), "--data", str(out / "encoded" / "unseen"), "-a", f"memory={adapter}")
    recall = ("evaluate", "recall", *common, "--frames", str(CLIP), "--clips", "2", "--out", str(out / "recall"))
    run(out, Job(name="recall", arguments=recall, result=out / "recall"))
    segments = ("--segments", str(2 * CLIP), "--window", "48", "--out", str(out / "context"))
    context = ("evaluate", "long-context", *common, *segments)
    run(out, Job(name="context", arguments=context, result=out / "context"))


if __name__ == "__main__":
    main()
