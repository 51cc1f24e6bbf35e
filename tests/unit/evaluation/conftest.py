"""Small models with a memory that is worth something, and recordings made of tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moshi_ttt import default_registry, inject, parse_config
from moshi_ttt.evaluation.documents import Document
from moshi_ttt.evaluation.models import ModelUnderTest
from moshi_ttt.hosts.moshi.tiny import FEW_CODEBOOKS, random_tiny_lm

CONTEXT, LAYERS = 8, 2
"""Of the models here."""
REACH = LAYERS * CONTEXT
"""Frames before a frame on which its losses depend, without a memory."""


def model_with(
    variant: str | None, *, name: str | None = None, noise: float = 0.05, context: int = CONTEXT, **options: Any
) -> ModelUnderTest:
    """A random Moshi with a short attention, and a block of random weights where a variant is given."""
    model = random_tiny_lm(context=context, num_layers=LAYERS, **FEW_CODEBOOKS)
    injection = None
    if variant:
        host = {"name": "moshi", "hf_repo": "builtin:tiny"}
        entry = {"variant": variant, "layers": "1", "chunk": 4, **options}
        injection = inject(model, parse_config({"host": host, "ttt": [entry]}, registry=default_registry()))
        generator = torch.Generator().manual_seed(1)
        for parameter in injection.parameters():
            parameter.data.add_(noise * torch.randn(parameter.shape, generator=generator))
    return ModelUnderTest(name=name or variant or "base", model=model, injection=injection, facts={})


@pytest.fixture
def base() -> ModelUnderTest:
    return model_with(None)


def document(frames: int, seed: int, *, text: bool = True) -> Document:
    """Random tokens."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 32, (1 + FEW_CODEBOOKS["n_q"], frames), generator=generator)
    if not text:
        codes[0] = -1
    return Document(f"talk{seed}", codes)
