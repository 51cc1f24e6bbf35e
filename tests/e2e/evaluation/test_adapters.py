"""Several adapters of one base model: it is loaded once, and each adapter gives what it gives alone, bit for bit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from moshi_ttt import default_registry, inject, parse_config
from moshi_ttt.core.adapter import MANIFEST, TENSORS, load_adapter, save_adapter
from moshi_ttt.core.errors import AdapterError, InjectionError
from moshi_ttt.evaluation import long_context, zero_shot
from moshi_ttt.evaluation.models import CONDITIONS, ModelUnderTest, evaluate_codes, load_models
from moshi_ttt.hosts.moshi import lora
from moshi_ttt.hosts.moshi.host import MOSHI_HOST, MoshiHost, MoshiHostConfig
from tests.small_moshi import QUEUES, small_moshi
from tests.unit.evaluation.conftest import document

HOST = MoshiHostConfig(hf_repo=small_moshi(), dtype="float32")
ADAPTERS = {
    "with a LoRA": ("fp32_state", True, [{"variant": "ttt_mlp", "layers": "1", "chunk": 4}]),
    "in place": ("uniform", False, [{"variant": "gating_mlp", "layers": "2", "chunk": 4, "train_w_down": True}]),
    "two blocks": (
        "fp32", False,
        [{"variant": "ttt_linear", "layers": "1", "chunk": 4}, {"variant": "gating_mlp", "layers": "1", "chunk": 4}],
    ),
    "a LoRA alone": ("fp32_state", True, []),
}  # fmt: skip
CODES = torch.randint(0, 32, (2, QUEUES, 11), generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Adapters whose every part changes what the model computes."""
    place, made = tmp_path_factory.mktemp("adapters"), {}
    for name, (precision, with_lora, entries) in ADAPTERS.items():
        host = HOST.model_dump(exclude_none=True)
        config = parse_config({"host": host, "precision": precision, "ttt": entries}, registry=default_registry())
        model = MOSHI_HOST.load(HOST)
        if with_lora:
            lora.add_lora(model, rank=2, scaling=2.0)
        injection = inject(model, config)
        generator = torch.Generator().manual_seed(len(made))
        with torch.no_grad():
            for parameter in (*injection.parameters(), *MOSHI_HOST.extra_parameters(model).values()):
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
        made[name] = save_adapter(injection, place / name)
    return made


@pytest.fixture
def loads(monkeypatch) -> list[torch.nn.Module]:
    """The base models that were loaded."""
    found: list[torch.nn.Module] = []
    real = MoshiHost.load
    monkeypatch.setattr(MoshiHost, "load", lambda self, *a, **b: found.append(real(self, *a, **b)) or found[-1])
    return found


def alone(name: str, folder: Path) -> ModelUnderTest:
    """A model under test that shares no base model."""
    model = MOSHI_HOST.load_for_adapter(HOST, folder)
    injection = load_adapter(model, folder)
    return ModelUnderTest(name=name, model=model, injection=injection if injection.blocks else None, facts={})


def values(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def losses_of(tested: ModelUnderTest) -> list[torch.Tensor]:
    """Its losses under every condition, streamed, and in segments."""
    found = []
    for condition in tested.conditions:
        for segments in (None, 5):
            losses = evaluate_codes(tested, CODES, condition, every=5, segments=segments)
            found += [losses.text, losses.audio]
    return found


def equal(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return len(first) == len(second) and all(
        torch.equal(a.nan_to_num(-1), b.nan_to_num(-1)) for a, b in zip(first, second, strict=True)
    )


def test_the_base_is_loaded_once_and_each_adapter_gives_what_it_gives_alone(folders, loads, tmp_path):
    shutil.copytree(folders["in place"].parent, tmp_path / "adapters")
    given = [(name, tmp_path / "adapters" / name) for name in folders]
    models = load_models(HOST, given, default_registry(), "cpu")
    shutil.rmtree(tmp_path / "adapters")  # a training may delete its older checkpoints
    assert len(loads) == 1
    assert {id(tested.model) for tested in models} == {id(loads[0])}
    classes, before = [type(module) for module in loads[0].modules()], values(loads[0])
    untouched = ModelUnderTest(name="base", model=MOSHI_HOST.load(HOST), injection=None, facts={})
    assert same(before, values(untouched.model))
    expected = {"base": losses_of(untouched)} | {
        name: losses_of(alone(name, folder)) for name, folder in folders.items()
    }
    assert not any(equal(expected["base"][:4], expected[name][:4]) for name in folders)
    for tested in (*models, *reversed(models)):
        assert equal(losses_of(tested), expected[tested.name]), tested.name
        assert [type(module) for module in loads[0].modules()] == classes
        assert same(values(loads[0]), before)
    for tested in models[1:]:
        counted = alone(tested.name, folders[tested.name])
        own = [] if counted.injection is None else [*counted.injection.parameters()]
        extra = MOSHI_HOST.extra_parameters(counted.model).values()
        assert tested.facts["parameters"] == sum(parameter.numel() for parameter in (*own, *extra))


@pytest.mark.exhaustive  # each adapter is compared with a model of its own above
def test_whole_evaluations_are_those_of_models_of_their_own(folders, loads):
    models = load_models(HOST, list(folders.items()), default_registry(), "cpu")
    assert len(loads) == 1
    documents = [document(140, seed) for seed in range(2)]
    options = long_context.Options(window=16, every=64, batch_size=2, conditions=CONDITIONS[:2], segments=35, seed=0)
    together = long_context.evaluate(models, documents, options)
    base = ModelUnderTest(name="base", model=MOSHI_HOST.load(HOST), injection=None, facts={})
    apart = long_context.evaluate([base, *(alone(n, f) for n, f in folders.items())], documents, options)
    assert [curve.label for curve in together.curves] == [curve.label for curve in apart.curves]
    assert all(
        torch.equal(a.windows.nan_to_num(-1), b.windows.nan_to_num(-1))
        for a, b in zip(together.curves, apart.curves, strict=True)
    )
    codes = document(20, 3).codes
    for tested in models[1:]:
        variant = zero_shot.ScoredModel(model=tested.model, host=MOSHI_HOST, present=tested.present)
        with variant.present():
            found = zero_shot.score_codes(variant.model, variant.host, codes)
        assert found == zero_shot.score_codes(alone("", folders[tested.name]).model, MOSHI_HOST, codes)


def spoil_host(folder: Path) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps({**manifest, "host": "audio"}))


def spoil_base(folder: Path) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["fingerprint"]["weights"] = "0" * 64
    (folder / MANIFEST).write_text(json.dumps(manifest))


def spoil_file(folder: Path) -> None:
    (folder / TENSORS).write_bytes((folder / TENSORS).read_bytes()[:-100])


@pytest.mark.parametrize("spoil", [spoil_host, spoil_base, spoil_file])
def test_an_adapter_that_cannot_be_loaded_leaves_the_base(folders, loads, tmp_path, spoil):
    shutil.copytree(folders["with a LoRA"], tmp_path / "bad")
    spoil(tmp_path / "bad")
    before = values(MOSHI_HOST.load(HOST))
    with pytest.raises(AdapterError):
        load_models(
            HOST, [("good", folders["in place"]), ("bad", tmp_path / "bad")], default_registry(), "cpu"
        )  # fmt: skip
    model = loads[-1]
    assert MOSHI_HOST.blocks(model) == {}
    assert same(values(model), before)


def test_an_adapter_that_is_none_is_refused_before_the_base_is_loaded(tmp_path, loads):
    with pytest.raises(AdapterError, match="is no adapter"):
        load_models(HOST, [("none", tmp_path)], default_registry(), "cpu")
    assert loads == []


def test_one_adapter_at_a_time(folders):
    given = [(name, folders[name]) for name in ("with a LoRA", "in place", "a LoRA alone")]
    base, first, second, third = load_models(HOST, given, default_registry(), "cpu")
    before = values(base.model)
    for one, other in ((first, second), (second, first), (third, second)):
        with one.present():
            with one.present():
                inside = values(base.model)
            assert same(values(base.model), inside)
            with pytest.raises(InjectionError, match="Another adapter is in this model"), other.present():
                pass
            assert same(values(base.model), inside)
        assert same(values(base.model), before)
    with pytest.raises(KeyError), first.present():
        raise KeyError
    assert same(values(base.model), before)
