"""The shipped tiny Moshi with a variant in it, as the tests of this folder use it."""

from __future__ import annotations

import pytest
import torch

from moshi_ttt import default_registry, inject, parse_config
from moshi_ttt.hosts.moshi.loading import resolve_repo

VARIANTS = ("ttt_linear", "ttt_mlp", "ttt_multilayer", "ttt_ridge", "gating_mlp")


def tiny_with(*entries: dict, dtype: torch.dtype = torch.float32, excite: bool = True):
    """``(model, injection)``: the bundle with blocks, their parameters disturbed so that every term counts."""
    registry = default_registry()
    host = {"name": "moshi", "hf_repo": "builtin:tiny"}
    config = parse_config({"host": host, "ttt": list(entries)}, registry=registry)
    model = resolve_repo("builtin:tiny").load_lm(dtype=dtype)
    injection = inject(model, config)
    if excite:
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in injection.parameters():
                parameter.add_((0.1 * torch.randn(parameter.shape, generator=generator)).to(parameter))
    return model, injection


@pytest.fixture(params=VARIANTS)
def variant(request) -> str:
    return request.param
