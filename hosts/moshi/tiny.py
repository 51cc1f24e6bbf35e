"""Small Moshis: the one that ships with the package, and random ones for tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from moshi_ttt.core.errors import HostError
from moshi_ttt.hosts.moshi.compiling import eager_on_cpu
from moshi_ttt.hosts.moshi.loading import BUNDLE
from moshi_ttt.hosts.moshi.upstream import ConditionFuser, LMModel, loaders

CROSS_CONDITION = "source"
"""The name of the condition that a random model with cross-attention looks at."""

# Moshi's own configuration, scaled down: the shape of everything is kept, the sizes are not.
RANDOM_TINY_CONFIG: dict[str, Any] = {
    **loaders._lm_kwargs,
    "dim": 64,
    "num_layers": 3,
    "num_heads": 4,
    "card": 32,
    "text_card": 48,
    "context": 48,
    "depformer_dim": 32,
    "depformer_dim_feedforward": int(4.125 * 32),
    "depformer_num_heads": 2,
    "depformer_num_layers": 1,
}

FEW_CODEBOOKS: dict[str, Any] = {"n_q": 4, "dep_q": 2, "delays": [0, 0, 1, 0, 1]}
"""Options of a Moshi with two codebooks for each voice instead of eight: a frame costs about a third."""


def bundle_folder() -> Path:
    """The folder of the tiny Moshi, laid out like a hub repository. Raises HostError when it was not installed."""
    if not (BUNDLE / "config.json").is_file():
        raise HostError(f"This installation has no tiny Moshi in {BUNDLE}; build it with scripts/build_tiny_bundle.py.")
    return BUNDLE


def tiny_config() -> dict[str, Any]:
    """The contents of the tiny Moshi's config.json. Raises HostError when it was not installed."""
    config: dict[str, Any] = json.loads((bundle_folder() / "config.json").read_text(encoding="utf-8"))
    return config


def speech_files() -> tuple[Path, ...]:
    """The recordings that ship with the tiny Moshi and that it was not trained on, by name."""
    return tuple(sorted((bundle_folder() / "speech").glob("*.wav")))


SPEECH = {"builtin:speech": "train.jsonl", "builtin:held-out": "held_out.jsonl"}
"""What a config calls the recordings that ship with the tiny Moshi -> their manifest. The longest is held out."""


def speech_manifest(name: str) -> Path:
    """The manifest of a name of ``SPEECH``. Raises HostError when it was not installed."""
    return bundle_folder() / "speech" / SPEECH[name]


def memory_adapter() -> Path:
    """The adapter that ships with the tiny Moshi: a memory (``ttt_ridge``) that recalls earlier speech of a stream.

    For ``core.adapter.load_adapter``, or ``-a memory=PATH`` on the command line. Raises HostError when it was not
    installed.
    """
    folder = bundle_folder() / "memory"
    if not (folder / "adapter.json").is_file():
        raise HostError(f"This installation has no {folder}; train it with scripts/train_tiny_memory.py.")
    return folder


def random_tiny_lm(
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    cross_attention: bool = False,
    context: int = 48,
    **overrides: Any,
) -> LMModel:
    """A small Moshi with random weights, in eval mode; no file is read and the global generator is left as it was.

    Args:
        seed: decides the weights, which are drawn in float32 whatever ``dtype`` is.
        cross_attention: every layer also attends to a condition named ``CROSS_CONDITION``.
        context: tokens that attention sees.
        overrides: any other option of Moshi's ``LMModel``.
    """
    options = {**RANDOM_TINY_CONFIG, "context": context, **overrides}
    if cross_attention:
        options |= {
            "cross_attention": True,
            "fuser": ConditionFuser({"sum": [], "cross": [CROSS_CONDITION], "prepend": []}),
        }
    if torch.device(device).type == "meta":
        return eager_on_cpu(LMModel(device=device, dtype=dtype, **options).eval())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LMModel(device="cpu", dtype=torch.float32, **options).to(device=device, dtype=dtype)
    return eager_on_cpu(model.eval())
