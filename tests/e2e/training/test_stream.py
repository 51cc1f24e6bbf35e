"""From ``moshi-ttt train`` to a stream that learns: on the CPU, and marked ``gpu`` on CUDA with NCCL and its graphs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from moshi.models import LMGen

from moshi_ttt import load_adapter
from moshi_ttt.hosts.moshi.layers import block_sites
from moshi_ttt.hosts.moshi.loading import resolve_repo
from moshi_ttt.hosts.moshi.tiny import FEW_CODEBOOKS
from moshi_ttt.training.checkpoint import find_checkpoints
from tests.small_moshi import small_moshi

from .conftest import values

CHUNK, STEPS = 4, 14
BLOCKS = {
    "ttt_linear": {"variant": "ttt_linear", "layers": "1,3", "chunk": CHUNK},
    "ttt_mlp": {"variant": "ttt_mlp", "layers": "1,3", "chunk": CHUNK},
    "ttt_multilayer": {"variant": "ttt_multilayer", "layers": "2", "chunk": CHUNK, "depth": 3},
    "ttt_ridge": {"variant": "ttt_ridge", "layers": "1,3", "chunk": CHUNK},
    "gating_mlp": {"variant": "gating_mlp", "layers": "0,2", "chunk": CHUNK, "lr": 0.3},
}


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request) -> str:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.fail("This test needs a CUDA device, and torch finds none.")
    return request.param


def train(device: str, config: Path) -> None:
    """Under torchrun on every CUDA device, with NCCL; alone on the CPU."""
    ranks = torch.cuda.device_count() if device == "cuda" else 1
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", "-m"]
    command = [sys.executable, *(torchrun if device == "cuda" else ["-m"]), "moshi_ttt", "train", str(config)]
    done = subprocess.run(
        command, env=dict(os.environ), cwd=config.parent, timeout=400, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]


def what_is_read(site) -> torch.Tensor:
    """``[B]``: how far the fast weights that a token reads have moved."""
    state = site._streaming_state.buffers
    if "solution" in state:  # of ttt_ridge, whose drift is that of its covariance, which every token changes
        return state["solution"].flatten(1).norm(dim=1).cpu()
    return site.block.drift(state).cpu()


@pytest.mark.exhaustive  # training, adapters and streams apart: test_run.py, tests/e2e/integration
@pytest.mark.parametrize("variant", BLOCKS)
def test_a_trained_block_learns_once_a_chunk_while_it_streams(encoded, tmp_path, device, variant):
    dtype = "bfloat16" if device == "cuda" else "float32"
    config = tmp_path / "config.yaml"
    small = {**values(encoded, tmp_path / "run"), "device": device, "param_dtype": dtype, "max_steps": 3}
    config.write_text(yaml.safe_dump({**small, "ttt": [BLOCKS[variant]], "log_health": True}))
    train(device, config)

    model = resolve_repo(small_moshi()).load_lm(device=device, dtype=getattr(torch, dtype))
    load_adapter(model, find_checkpoints(tmp_path / "run")[-1] / "adapter")
    sites = [site for layer in model.transformer.layers for site in block_sites(layer)]
    generator = LMGen(model, use_sampling=False)  # on CUDA it captures its step in a graph
    shape = (2, FEW_CODEBOOKS["dep_q"], STEPS)  # [B, K, T]
    heard = torch.randint(0, 100, shape, generator=torch.Generator().manual_seed(0)).to(device)
    changed = torch.zeros(len(sites), 2, dtype=torch.int64)
    with generator.streaming(2):
        before = [what_is_read(site) for site in sites]
        for step in range(STEPS):
            generator.step(heard[:, :, step : step + 1])
            now = [what_is_read(site) for site in sites]
            changed += torch.stack([a != b for a, b in zip(now, before, strict=True)])
            before = now
        assert all(bool(drift.isfinite().all()) for drift in before)
    assert changed.tolist() == [[STEPS // CHUNK] * 2] * len(sites)
