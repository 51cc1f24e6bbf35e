"""A block and a host that are written with public names alone pass the conformance kit.

``forgetting.py`` is a block with a short convolution and a forgetting gate, ``llama.py`` a host with a growing cache,
left padding and a split gated MLP. What they need that core does not have is a gap in the contracts.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from moshi_ttt import default_registry, inject, parse_config
from moshi_ttt.core.block import SiteKind
from moshi_ttt.core.testing import HostCase, HostStream, Shape, conformance_tests, host_conformance_tests
from tests.conformance.outside.forgetting import ForgettingBlock, ForgettingConfig
from tests.conformance.outside.llama import GATED, LAYERS, LLAMA_HOST, VOCABULARY, LlamaModel, Stream, checked

FOLDER = Path(__file__).parent
ALLOWED = {"moshi_ttt", "torch", "pydantic"}

REGISTRY = default_registry().copy()
REGISTRY.register_block("forgetting", config=ForgettingConfig, block=ForgettingBlock)
REGISTRY.register("host", "toy_llama", LLAMA_HOST)


class LlamaStream(HostStream):
    def __init__(self, model: LlamaModel, stream: Stream) -> None:
        self.model, self.stream = model, stream

    def step(self, tokens: Tensor) -> Tensor:
        return self.model(tokens)

    def step_masked(self, tokens: Tensor, token_mask: Tensor) -> Tensor:
        return self.model(tokens, token_mask)

    def reset(self, mask: Tensor) -> None:
        self.stream.reset(self.model, mask)

    def execute(self, mask: Tensor) -> None:
        self.stream.exec_mask = mask


@contextmanager
def stream(model: nn.Module, rows: int) -> Iterator[HostStream]:
    with checked(model).streaming(rows) as started:
        yield LlamaStream(checked(model), started)


def tokens(batch: int, length: int, seed: int) -> Tensor:
    return torch.randint(VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


LLAMA = HostCase(
    name="llama",
    host=LLAMA_HOST,
    model=lambda dtype: LLAMA_HOST.load(None, dtype=dtype),
    tokens=tokens,
    logits=lambda model, given: model(given),
    stream=stream,
    growing_cache=True,
    skeleton=lambda dtype: LLAMA_HOST.skeleton(None).to(dtype),
    masked_logits=lambda model, given, mask: model(given, mask),
)

test_forgetting = conformance_tests(
    "forgetting",
    {},
    {"taps": 2, "gate": 0.3, "forget": -1.0},
    registry=REGISTRY,
    shapes=[Shape(), Shape(dim=24, heads=3, batch=2)],
)
OFF = {"gate": {"init": 0.0}}
test_forgetting_in_llama = host_conformance_tests(LLAMA, "forgetting", identity={"gate": 0.0}, registry=REGISTRY)
test_ttt_linear_in_llama = pytest.mark.exhaustive(  # a block of this kind is above
    host_conformance_tests(
        LLAMA,
        "ttt_linear",
        {"chunk": 4},
        identity=OFF,
        registry=REGISTRY,
        beside={"variant": "gating_mlp", "chunk": 4, "lr": 0.1},
    )
)
test_gating_mlp_in_llama = pytest.mark.exhaustive(  # in Moshi by default
    host_conformance_tests(LLAMA, "gating_mlp", {"chunk": 4, "lr": 0.1}, identity={}, registry=REGISTRY)
)


@pytest.mark.parametrize(("name", "most"), [("forgetting.py", 100), ("llama.py", 250)])
def test_what_is_outside_is_short_and_imports_public_names_alone(name: str, most: int) -> None:
    text = (FOLDER / name).read_text(encoding="utf-8")
    assert len(text.splitlines()) <= most
    imported = 0
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            modules, names = [alias.name for alias in node.names], []
        elif isinstance(node, ast.ImportFrom):
            modules, names = [str(node.module)], [alias.name for alias in node.names]
        else:
            continue
        for module in modules:
            root, *rest = module.split(".")
            assert root in ALLOWED or root in sys.stdlib_module_names, module
            assert root != "moshi_ttt" or rest[:1] in ([], ["core"]), f"{module} is not of the package's public part"
            assert not any(part.startswith("_") for part in [*rest, *names] if module != "__future__"), (module, names)
            imported += root == "moshi_ttt"
    assert imported
    private = [node.attr for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Attribute)]
    mine = {"_attend", "_switched"}
    assert [name for name in private if name.startswith("_") and name not in mine and not name.endswith("__")] == []


def test_a_config_counts_layers_over_the_sites_that_the_host_has() -> None:
    config = parse_config(
        {
            "host": {"name": "toy_llama"},
            "ttt": [
                {"variant": "forgetting", "layers": "last:1"},
                {"variant": "gating_mlp", "layers": "last:2", "chunk": 4},
            ],
        },
        registry=REGISTRY,
    )
    injection = inject(LLAMA_HOST.load(None), config, registry=REGISTRY)
    found = [(site.layer, site.kind) for site in injection.blocks]
    assert found == [(1, SiteKind.FEED_FORWARD), (2, SiteKind.FEED_FORWARD), (LAYERS - 1, SiteKind.SEQUENCE)]
    assert GATED[-2:] == (1, 2)
