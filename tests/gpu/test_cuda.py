"""What only a CUDA device can show: ``make test-gpu``. The kit on the device, a captured graph, NCCL on one rank."""

from __future__ import annotations

import pytest
import torch
from moshi.models import LMGen

from moshi_ttt import default_registry, inject, parse_config
from moshi_ttt.core.precision import FP32_STATE
from moshi_ttt.core.sharding import shard
from moshi_ttt.core.testing import error
from moshi_ttt.hosts.moshi.host import MOSHI_HOST
from moshi_ttt.hosts.moshi.loading import resolve_repo
from moshi_ttt.hosts.moshi.streaming import stream_state

pytestmark = pytest.mark.gpu
VARIANTS = ("ttt_linear", "ttt_mlp")


@pytest.fixture(autouse=True)
def device() -> None:
    if not torch.cuda.is_available():
        pytest.fail("These tests need a CUDA device, and torch finds none.")


def model_with(variant: str, *, device: str, dtype: torch.dtype):
    registry = default_registry()
    host = {"name": "moshi", "hf_repo": "builtin:tiny"}
    config = parse_config({"host": host, "ttt": [{"variant": variant, "layers": "1,3", "chunk": 4}]}, registry=registry)
    model = resolve_repo("builtin:tiny").load_lm(device=device, dtype=dtype)
    injection = inject(model, config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in injection.parameters():
            parameter.add_((0.1 * torch.randn(parameter.shape, generator=generator)).to(parameter))
    return model, injection


def codes(length: int, batch: int = 2) -> torch.Tensor:
    return torch.randint(0, 128, (batch, 17, length), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_device_computes_what_the_cpu_computes(variant):
    with torch.no_grad():
        expected = model_with(variant, device="cpu", dtype=torch.float32)[0].forward_text(codes(13))[1]
        actual = model_with(variant, device="cuda", dtype=torch.float32)[0].forward_text(codes(13).cuda())[1]
    assert error(actual.cpu(), expected) < 1e-3  # kernels of another library, over four layers


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_captured_graph_updates_the_state_at_every_replay(variant):
    """Moshi captures the step at its second call: from then on no Python runs, and the state must move all the same."""
    model, _ = model_with(variant, device="cuda", dtype=torch.bfloat16)
    generator = LMGen(model, use_sampling=False)
    counted = []
    with generator.streaming(2):
        for t in range(24):
            generator.step(codes(24)[:, 9:, t : t + 1].cuda())
            state = {name: tensor for name, tensor in stream_state(generator).items() if ".ttt/" in name}
            counted.append([int(tensor[0]) for name, tensor in state.items() if name.endswith("position")])
        assert all(tensor.dtype == torch.float32 for tensor in state.values() if tensor.is_floating_point())
    assert counted == [[(t + 1) % 4] * 2 for t in range(24)]


@pytest.mark.parametrize("variant", VARIANTS)
def test_one_rank_of_nccl_trains(variant, tmp_path):
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("nccl", store=store, rank=0, world_size=1)
    try:
        model, injection = model_with(variant, device="cuda", dtype=torch.bfloat16)
        injection.freeze_base()
        shard(MOSHI_HOST, model, FP32_STATE.roles(torch.bfloat16))
        optimizer = torch.optim.AdamW(injection.parameters(), lr=1e-3)
        losses = []
        for _ in range(5):
            out = model(codes(13).cuda())
            target = codes(13)[:, 1:9].cuda()[out.mask]
            loss = torch.nn.functional.cross_entropy(out.logits[out.mask].float(), target)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
        assert losses[-1] < losses[0]
    finally:
        torch.distributed.destroy_process_group()
