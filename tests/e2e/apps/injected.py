"""The tiny Moshi with a block in its last layer, for the tests of health figures."""

from __future__ import annotations

from typing import Any

from moshi_ttt import default_registry, inject, parse_config
from moshi_ttt.core.injection import Injection
from moshi_ttt.hosts.moshi.host import MOSHI_HOST


def injected(
    variant: str = "ttt_mlp", dtype: str = "float32", precision: str = "fp32_state", **options: Any
) -> Injection:
    """The injection; the base model is frozen. ``options`` are the block's."""
    entry = {"variant": variant, "layers": "last:1", **options}
    host = {"name": "moshi", "hf_repo": "builtin:tiny", "dtype": dtype}
    config = parse_config({"host": host, "precision": precision, "ttt": [entry]}, registry=default_registry())
    injection = inject(MOSHI_HOST.load(config.host), config)
    injection.freeze_base()
    return injection
