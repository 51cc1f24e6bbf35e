"""The section about training: NCCL on one rank (gloo on a CPU), through the command's own code and files."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

from rich.console import Console
from safetensors.torch import load_file

from moshi_ttt import default_registry
from moshi_ttt.configs.settings import parse_settings
from moshi_ttt.data.audio import read_audio
from moshi_ttt.hosts.moshi.tiny import speech_files
from moshi_ttt.training.run import run

from .cases import VARIANTS
from .report import Report, error

STEPS = 6


def training_and_resume(report: Report) -> None:
    """Deterministic, FSDP2, carried memory, LoRA, checkpointing: twice the same, stopped and resumed, every variant."""
    manifest = _manifest(report.folder / "speech.jsonl")
    names = list(VARIANTS) if report.cuda else ["gating_mlp clipped"]
    for name in names:
        if report.out_of_time(f"{name} and what follows"):
            return
        folders = {
            what: report.folder / "runs" / f"{name.replace(' ', '-')}-{what}" for what in ("one", "two", "parted")
        }
        for what, folder in folders.items():
            _train(report, name, manifest, folder, checkpoints=STEPS // 2 if what == "parted" else 0)
        _take_away(folders["parted"], STEPS)
        _train(report, name, manifest, folders["parted"], checkpoints=STEPS // 2, resume=True)
        losses = {what: _losses(folder) for what, folder in folders.items()}
        finite = all(math.isfinite(loss) for loss in losses["one"]) and len(losses["one"]) == STEPS
        report.check(f"{name}: steps that are missing or not finite", float(not finite), 0.0)
        trained = {what: _adapter(folder, STEPS) for what, folder in folders.items()}
        start = _adapter(folders["parted"], STEPS // 2)
        still = sum(bool((trained["one"][key] == start[key]).all()) for key in start)
        report.check(f"{name}: share of tensors that never moved", still / len(start), 0.5)
        for what, label in (("two", "twice the same"), ("parted", "stopped and resumed")):
            apart = max(abs(a - b) for a, b in zip(losses["one"], losses[what], strict=True))
            report.check(f"{name}: {label}, losses", apart, 0.0, "bit for bit")
            worst = max(error(trained[what][key], tensor) for key, tensor in trained["one"].items())
            report.check(f"{name}: {label}, parameters", worst, 0.0, "bit for bit")


def _manifest(path: Path) -> Path:
    """The recordings that ship with the package, as a manifest of training data."""
    lines = []
    for recording in speech_files():
        seconds = read_audio(recording, 24_000).shape[-1] / 24_000
        lines.append(json.dumps({"path": str(recording), "duration": seconds}))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def _train(report: Report, name: str, manifest: Path, folder: Path, *, checkpoints: int, resume: bool = False) -> None:
    if not resume:
        shutil.rmtree(folder, ignore_errors=True)
    values: dict[str, Any] = {
        "data": {"train_data": str(manifest), "transcripts": "none"}, "run_dir": str(folder), "resume": resume,
        "host": {"name": "moshi", "hf_repo": "builtin:tiny"}, "ttt": [{**VARIANTS[name], "layers": "1,3"}],
        "device": report.device.type, "param_dtype": "bfloat16", "duration_sec": 1.6, "batch_size": 2,
        "max_steps": STEPS, "carry_state": True, "gradient_checkpointing": True, "lora": {"enable": True, "rank": 4},
        "optim": {"lr": 1e-3, "eps": 1e-6}, "ckpt_freq": checkpoints, "num_ckpt_keep": None, "log_health": False,
        "deterministic": True,
    }  # fmt: skip
    registry = default_registry()
    run(parse_settings(values, registry=registry, where="gpu_check"), registry, Console(quiet=True))


def _checkpoint(folder: Path, step: int) -> Path:
    return folder / "checkpoints" / f"checkpoint_{step:06d}"


def _take_away(folder: Path, step: int) -> None:
    """As if the run had been killed before this checkpoint."""
    shutil.rmtree(_checkpoint(folder, step))


def _adapter(folder: Path, step: int) -> dict[str, Any]:
    return load_file(_checkpoint(folder, step) / "adapter" / "adapter.safetensors")


def _losses(folder: Path) -> list[float]:
    """The loss of each step, as it was logged last."""
    found = {}
    for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        if record["kind"] == "train":
            found[record["step"]] = float(record["loss"])
    return [found[step] for step in sorted(found)]
