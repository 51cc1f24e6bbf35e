"""The tiny Moshi with blocks whose parameters are moved away from their start, as by training."""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
from torch import nn

from moshi_ttt import inject, parse_config
from moshi_ttt.core.injection import Injection
from moshi_ttt.core.registry import default_registry
from moshi_ttt.hosts.moshi.host import MOSHI_HOST


@functools.cache
def _tiny(dtype: str) -> nn.Module:
    """Read once; who changes it takes a copy."""
    return MOSHI_HOST.load(MOSHI_HOST.config_class(name="moshi", hf_repo="builtin:tiny", dtype=dtype))


def tiny_with_trained(blocks: list[dict[str, Any]], dtype: str = "float32") -> tuple[Any, Injection]:
    """The model and its injection; each parameter of a block is moved by a tenth of a normal draw."""
    config = parse_config(
        {"host": {"name": "moshi", "hf_repo": "builtin:tiny", "dtype": dtype}, "ttt": blocks},
        registry=default_registry(),
    )
    model = copy.deepcopy(_tiny(dtype))
    injection = inject(model, config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in injection.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model, injection
