"""One training step of a Moshi of full width and one layer, bfloat16, on the CPU: ``make test-full-size``."""

from __future__ import annotations

import json
import resource
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from moshi_ttt import default_registry
from moshi_ttt.configs.settings import Settings, parse_settings
from moshi_ttt.core.sharding import whole
from moshi_ttt.data.dataset import CodesBatch
from moshi_ttt.hosts.moshi.host import MOSHI_HOST
from moshi_ttt.hosts.moshi.loading import load_skeleton
from moshi_ttt.hosts.moshi.tiny import bundle_folder, tiny_config
from moshi_ttt.hosts.moshi.upstream import loaders
from moshi_ttt.training.model import build
from moshi_ttt.training.runtime import start
from moshi_ttt.training.trainer import Trainer

pytestmark = pytest.mark.full_size

FRAMES = 40
"""A chunk of the block, and one frame that its update reaches."""
LIMIT_GIB = 16


@pytest.fixture
def repository(tmp_path) -> Iterator[Path]:
    """A folder laid out as the published repository is, one layer deep, with random weights; 3 GB, deleted after."""
    names = {key: value for key, value in tiny_config().items() if key.endswith("_name") or key == "model_type"}
    folder = tmp_path / "moshi"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**loaders._lm_kwargs, "num_layers": 1, **names}))
    for key in ("mimi_name", "mimi_config_name", "tokenizer_name"):
        shutil.copy(bundle_folder() / names[key], folder)
    tile = 0.02 * torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    weights = {}
    for name, tensor in load_skeleton(str(folder), dtype=torch.bfloat16).state_dict().items():
        # Cheap, but for the gains of the norms of a size that lets gradients through.
        weights[name] = torch.ones_like(tensor, device="cpu") if name.endswith("alpha") else _tiled(tile, tensor)
    save_file(weights, folder / names["moshi_name"])
    del weights
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def _tiled(tile: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    values = torch.empty(like.numel(), dtype=like.dtype)
    for piece in values.split(tile.numel()):
        piece.copy_(tile[: piece.numel()])
    return values.view(like.shape)


def _settings(repository: Path, run_dir: Path) -> Settings:
    values = {
        "data": {"train_data": "none.jsonl"},
        "run_dir": str(run_dir),
        "moshi_paths": {"hf_repo_id": str(repository)},
        "param_dtype": "bfloat16",
        "gradient_checkpointing": True,
        "max_steps": 10,
        "optim": {"lr": 1e-3},
        "ttt": [{"variant": "ttt_mlp", "layers": "0", "chunk": 16}],
    }
    return parse_settings(values, registry=default_registry(), where="test")


def _random_batch(model) -> CodesBatch:
    generator = torch.Generator().manual_seed(1)
    text = torch.randint(0, model.text_card, (1, 1, FRAMES), generator=generator)
    audio = torch.randint(0, model.card, (1, model.n_q, FRAMES), generator=generator)
    return CodesBatch(torch.cat([text, audio], dim=1), torch.zeros(1, dtype=torch.int64), ())


def test_one_step_of_a_full_width_layer(repository, tmp_path):
    settings = _settings(repository, tmp_path / "run")
    with start("cpu", None) as runtime:
        began = time.perf_counter()
        trained = build(settings, runtime.mesh, runtime.device)
        built = time.perf_counter() - began
        blocks = dict(trained.injection.named_parameters())
        base = MOSHI_HOST.base_state_dict(trained.model)
        assert trained.model.dim == 4096
        assert {parameter.dtype for parameter in blocks.values()} == {torch.float32}
        assert {tensor.dtype for tensor in base.values()} == {torch.bfloat16}
        assert {id(p) for p in trained.model.parameters() if p.requires_grad} == {id(p) for p in blocks.values()}
        before = {name: whole(parameter).detach().clone() for name, parameter in blocks.items()}

        began = time.perf_counter()
        step = Trainer(trained, settings.run, runtime).make_step([_random_batch(trained.model)])
        stepped = time.perf_counter() - began

        assert not step.skipped
        assert 0 < step.losses.total < float("inf")
        assert step.gradient_norm > 0
        for name, parameter in blocks.items():
            gradient = whole(parameter.grad)
            assert gradient.dtype == torch.float32
            assert gradient.isfinite().all(), name
            assert gradient.any(), name
            assert not torch.equal(whole(parameter), before[name]), name
        with safe_open(settings.host.bundle().info.moshi_weights, framework="pt") as file:
            assert set(file.keys()) == base.keys()
            for name, tensor in base.items():
                assert torch.equal(whole(tensor), file.get_tensor(name)), name
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    sizes = [sum(tensor.numel() for tensor in part.values()) for part in (base, blocks)]
    print(
        f"\n{sizes[0]:,} base parameters and {sizes[1]:,} of the block: built in {built:.1f} s, one step of {FRAMES} "
        f"frames in {stepped:.1f} s (loss {step.losses.total:.2f}, gradient norm {step.gradient_norm:.3g}), peak "
        f"{peak:.1f} GiB"
    )
    assert peak < LIMIT_GIB
