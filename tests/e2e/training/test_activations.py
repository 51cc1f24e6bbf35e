"""What ``train --plan`` says a step holds, against steps that run: every variant, checkpointing, LoRA, everything."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch

from moshi_ttt import default_registry
from moshi_ttt.configs.settings import parse_settings
from moshi_ttt.core.device_log import DeviceLog
from moshi_ttt.core.host import CarriedState
from moshi_ttt.hosts.moshi.host import MOSHI_HOST
from moshi_ttt.training.activations import step_bytes
from moshi_ttt.training.model import skeleton

ROWS, FRAMES, WITHIN = 3, 40, 0.15
VARIANTS: dict[str, dict[str, Any]] = {
    "ttt_linear": {"chunk": 8}, "ttt_mlp": {"chunk": 8}, "ttt_mlp grouped": {"chunk": 4, "checkpoint_chunks": 2},
    "ttt_multilayer": {"chunk": 8}, "ttt_ridge": {"chunk": 8}, "gating_mlp": {"chunk": 16},
}  # fmt: skip
RUNS: dict[str, dict[str, Any]] = {
    "blocks": {}, "LoRA": {"lora": {"enable": True, "rank": 8}}, "everything": {"full_finetuning": True},
}  # fmt: skip
QUICK = {("ttt_mlp", "LoRA", True), ("gating_mlp", "blocks", False), ("ttt_mlp grouped", "everything", False)}


def built(variant: str, run: dict[str, Any], checkpointing: bool) -> Any:
    values = {
        "data": {"train_data": "none.jsonl"}, "run_dir": "run", "moshi_paths": {"hf_repo_id": "builtin:tiny"},
        "param_dtype": "float32", "gradient_checkpointing": checkpointing,
        "ttt": [{"variant": variant.split()[0], "layers": "1,3", **VARIANTS[variant]}], **run,
    }  # fmt: skip
    return skeleton(parse_settings(values, registry=default_registry(), where="test"), default_registry())


def measured(trained: Any, carried: bool) -> tuple[int, int]:
    """Kept and peak bytes of a step that runs on the CPU."""
    model = trained.model.to_empty(device="cpu")
    for tensor in (*model.parameters(), *model.buffers()):
        with torch.no_grad():
            tensor.zero_() if not tensor.is_floating_point() else tensor.normal_(std=0.02)
    codes = torch.randint(0, 100, (ROWS, model.num_codebooks, FRAMES), generator=torch.Generator().manual_seed(0))
    state = None
    if carried:
        blocks = {site: block.allocate_state(ROWS) for site, block in trained.injection.blocks.items()}
        state = CarriedState(blocks, torch.zeros(ROWS, dtype=torch.int64))
    with DeviceLog("cpu") as log, MOSHI_HOST.carry(model, state) if carried else torch.enable_grad():
        loss = trained.losses.sums(model, codes)[0].sum()
        kept = log.bytes
        loss.backward()
    return kept, log.peak


@pytest.mark.first_by_default
@pytest.mark.parametrize("carried", [False, True], ids=["", "carried"])
@pytest.mark.parametrize(
    ("variant", "run", "checkpointing"),
    [
        pytest.param(*each, marks=() if each in QUICK else pytest.mark.slow)
        for each in product(VARIANTS, RUNS, (False, True))
    ],
)  # fmt: skip
def test_the_plan_is_within_fifteen_percent_of_a_step_that_runs(variant, run, checkpointing, carried):
    planned = step_bytes(
        built(variant, RUNS[run], checkpointing), rows=ROWS, frames=FRAMES, carried=carried, gradients=True
    )
    kept, peak = measured(built(variant, RUNS[run], checkpointing), carried)
    print(f"{variant}, {run}: kept {planned.kept / kept:.3f}, peak {planned.peak / peak:.3f}")
    assert planned.problems == (), "a training step of Moshi with blocks waits for the device"
    assert abs(planned.kept / kept - 1) < WITHIN
    assert abs(planned.peak / peak - 1) < WITHIN
