"""A Moshi with few codebooks and random weights, beside the codec that ships.

What a test trains costs Python rather than arithmetic: it grows with the number of parameters and codebooks, and a
small run with this model takes about half the time of one with the shipped model.
"""

from __future__ import annotations

import atexit
import functools
import json
import shutil
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

from moshi_ttt.hosts.moshi.tiny import FEW_CODEBOOKS, bundle_folder, random_tiny_lm, tiny_config

QUEUES = 1 + FEW_CODEBOOKS["n_q"]
"""Q: rows of tokens of a frame, one of text and two voices' codes."""
SIZES = {
    **FEW_CODEBOOKS, "dim": 64, "num_heads": 4, "depformer_dim": 32, "depformer_dim_feedforward": 132,
    "depformer_num_heads": 2, "depformer_num_layers": 1,
}  # fmt: skip
FILES = ("mimi_config_name", "mimi_name", "tokenizer_name")


@functools.cache
def small_moshi(context: int | None = None) -> str:
    """The folder of this process's small Moshi, as ``hf_repo`` takes it; it goes with the process.

    Its attention sees ``context`` frames, or as many as the shipped model's.
    """
    folder = Path(tempfile.mkdtemp(prefix="small-moshi-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    config = tiny_config() | SIZES
    config["context"] = context or config["context"]
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    for name in FILES:
        shutil.copy(bundle_folder() / config[name], folder)
    model = random_tiny_lm(
        dtype=torch.bfloat16, card=config["card"], text_card=config["text_card"], num_layers=config["num_layers"],
        context=config["context"], **SIZES,
    )  # fmt: skip
    save_file(model.state_dict(), folder / config["moshi_name"])
    return str(folder)
