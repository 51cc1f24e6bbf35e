"""Adapters: bit-equal round trips, saving that is whole or not at all, loading that refuses what does not fit."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from moshi_ttt.core.adapter import MANIFEST, TENSORS, fill_from_adapter, load_adapter, read_manifest, save_adapter
from moshi_ttt.core.config_parsing import parse_block
from moshi_ttt.core.errors import AdapterError, MoshiTTTError
from moshi_ttt.core.injection import Injection, make_plan
from moshi_ttt.core.precision import FP32_STATE, UNIFORM, PrecisionPolicy
from moshi_ttt.core.registry import Registry, default_registry
from tests.unit.core.test_injection import Untouched
from tests.unit.core.toy import AnyNameConfig, Gate, ToyBlock, ToyConfig, ToyModel, toy_registry

ENTRIES = (ToyConfig(layers="1,3", rate=0.25, gate=Gate(init=0.5)), ToyConfig(variant="toy_mlp", layers="0"))


def injected(
    *entries: ToyConfig,
    dtype: torch.dtype = torch.float32,
    policy: PrecisionPolicy = FP32_STATE,
    registry: Registry | None = None,
) -> Injection:
    """Blocks with values that no initialization gives."""
    registry = registry or toy_registry()
    model = ToyModel(dtype=dtype)
    injection = make_plan(
        model, registry.host("toy"), entries or ENTRIES, policy=policy, registry=registry, seed=5
    ).apply(model)
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in injection.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return injection


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


# ---- buffers, sites of one layer, who made the variant


class WithBuffers(ToyBlock):
    """A block with persistent buffers of several dtypes, and one that is not persistent."""

    def __init__(self, config, info, roles):
        super().__init__(config, info, roles)
        self.register_buffer("seen", torch.zeros(2, dtype=torch.int64, device=info.device))
        self.register_buffer("mean", torch.zeros(3, dtype=torch.bfloat16, device=info.device))
        self.register_buffer("cache", torch.zeros(1, device=info.device), persistent=False)

    def reset_parameters(self, generator=None):
        super().reset_parameters(generator)
        self.seen.zero_()
        self.mean.fill_(0.5)


class WithExtraState(ToyBlock):
    def get_extra_state(self):
        return {"python": 1}

    def set_extra_state(self, state):
        pass


def registry_of(block: type[ToyBlock]) -> Registry:
    registry = toy_registry()
    registry.register_block("buffered", config=AnyNameConfig, block=block)
    return registry


def test_persistent_buffers_are_saved_and_loaded_with_their_dtypes(tmp_path):
    registry = registry_of(WithBuffers)
    injection = injected(AnyNameConfig(variant="buffered", layers="1"), registry=registry)
    block = next(iter(injection.blocks.values()))
    block.seen.copy_(torch.tensor([3, -4]))
    block.mean.copy_(torch.tensor([1.5, -2.0, 3.0]))
    block.cache.fill_(7)
    folder = save_adapter(injection, tmp_path / "adapter")
    names = load_file(folder / TENSORS).keys()
    assert {name.rpartition(".")[2] for name in names} >= {"seen", "mean"}
    assert not any(name.endswith("cache") for name in names)
    loaded = next(iter(load_adapter(ToyModel(dtype=torch.float32), folder, registry=registry).blocks.values()))
    for name in ("seen", "mean"):
        assert getattr(loaded, name).dtype == getattr(block, name).dtype
        assert torch.equal(getattr(loaded, name), getattr(block, name))


def test_an_adapter_without_a_buffer_of_its_block_is_refused(tmp_path):
    registry = registry_of(WithBuffers)
    folder = save_adapter(injected(AnyNameConfig(variant="buffered", layers="1"), registry=registry), tmp_path / "a")
    tensors = load_file(folder / TENSORS)
    save_file({name: t for name, t in tensors.items() if not name.endswith("seen")}, folder / TENSORS)
    with pytest.raises(AdapterError, match=r"missing layers\.1\.sequence\.seen"):
        load_adapter(ToyModel(dtype=torch.float32), folder, registry=registry)


def test_state_that_an_adapter_cannot_hold_is_refused(tmp_path):
    injection = injected(AnyNameConfig(variant="buffered", layers="1"), registry=registry_of(WithExtraState))
    with pytest.raises(AdapterError, match=r"_extra_state, which is neither a parameter.*Nothing was saved"):
        save_adapter(injection, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def made_with(folder: Path, **changes: str) -> Path:
    """The adapter as if another distribution or version had made its first block."""
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["sites"][0] |= changes
    (folder / MANIFEST).write_text(json.dumps(manifest))
    return folder


def inject_tiny(model: torch.nn.Module) -> Injection:
    registry = default_registry()
    blocks = [
        {"variant": "gating_mlp", "layers": "2", "chunk": 4}, {"variant": "ttt_linear", "layers": "2", "chunk": 4},
        {"variant": "ttt_mlp", "layers": "0", "chunk": 4},
    ]  # fmt: skip
    entries = [parse_block(entry, registry=registry) for entry in blocks]
    return make_plan(model, registry.host("moshi"), entries, policy=FP32_STATE, registry=registry).apply(model)


def tiny() -> torch.nn.Module:
    host = default_registry().host("moshi")
    return host.load(host.config_class(name="moshi", hf_repo="builtin:tiny", dtype="float32"))


def test_two_blocks_in_one_layer_are_saved_and_loaded(tmp_path):
    model = tiny()
    injection = inject_tiny(model)
    folder = save_adapter(injection, tmp_path / "adapter")
    loaded = load_adapter(tiny(), folder)
    assert set(loaded.blocks) == set(injection.blocks)
    assert all(torch.equal(p, dict(loaded.named_parameters())[name]) for name, p in injection.named_parameters())
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["sites"].reverse()
    (folder / MANIFEST).write_text(json.dumps(manifest))
    assert set(load_adapter(tiny(), folder).blocks) == set(injection.blocks), "the order of sites means nothing"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"distribution": "other-ttt", "plugin": "theirs"},
            r"other-ttt 0.* another distribution\. Install other-ttt",
        ),
        ({"version": "1.2.0"}, r"moshi-ttt 1\.2\.0 .* another major version .* Install moshi-ttt==1\.\*"),
    ],
)
def test_a_variant_of_another_distribution_or_major_version_is_refused(tmp_path, changes, message):
    injection = inject_tiny(tiny())
    folder = made_with(save_adapter(injection, tmp_path / "adapter"), **changes)
    model = tiny()
    with pytest.raises(AdapterError, match=message):
        load_adapter(model, folder)
    assert not default_registry().host("moshi").blocks(model)
    with pytest.raises(AdapterError, match=message):
        fill_from_adapter(injection, folder)


def test_another_minor_version_is_accepted(tmp_path):
    folder = made_with(save_adapter(inject_tiny(tiny()), tmp_path / "adapter"), version="0.999")
    assert load_adapter(tiny(), folder).blocks


def test_an_option_that_an_adapter_does_not_name_was_at_its_default(tmp_path):
    injection = inject_tiny(tiny())
    folder = save_adapter(injection, tmp_path / "adapter")
    saved = read_manifest(folder)["sites"][0]["config"]
    assert saved["output_scale"] == 1
    edit_sites(folder, lambda site: site["config"].pop("output_scale"))
    assert fill_from_adapter(injection, folder) == []
    edit_sites(folder, lambda site: site["config"].update(output_scale=0.5))
    assert all("output_scale was 0.5 and is 1.0" in note for note in fill_from_adapter(injection, folder))
    blocks = load_adapter(tiny(), folder).blocks.values()
    assert [block.config.output_scale for block in blocks] == [0.5] * len(blocks)


def test_a_variant_registered_at_run_time_is_taken_with_a_warning(tmp_path):
    folder = made_with(save_adapter(injected(), tmp_path / "adapter"), distribution="other-ttt", version="3")
    with pytest.warns(UserWarning, match=r"of other-ttt 3 .* It is taken for the same"):
        assert load_adapter(ToyModel(dtype=torch.float32), folder, registry=toy_registry()).blocks


# ---- round trips


@pytest.mark.parametrize("policy", [FP32_STATE, UNIFORM], ids=lambda policy: policy.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_save_and_load_are_bit_equal(tmp_path, dtype, policy):
    injection = injected(dtype=dtype, policy=policy)
    folder = save_adapter(injection, tmp_path / "adapter", training_step=42)
    loaded = load_adapter(ToyModel(dtype=dtype), folder, registry=toy_registry())
    want, have = dict(injection.named_parameters()), dict(loaded.named_parameters())
    assert have.keys() == want.keys()
    for name, parameter in want.items():
        assert have[name].dtype == parameter.dtype, name
        assert torch.equal(have[name], parameter), name
    x = torch.randn(2, 5, 8).to(dtype)
    assert torch.equal(loaded.model(x), injection.model(x))
    assert [block.config.model_dump(exclude={"layers"}) for block in loaded.plan.blocks] == [
        block.config.model_dump(exclude={"layers"}) for block in injection.plan.blocks
    ]


def test_saving_what_was_loaded_gives_the_same_files(tmp_path):
    first = save_adapter(injected(), tmp_path / "first", training_step=3)
    again = load_adapter(ToyModel(), first, registry=toy_registry())
    second = save_adapter(again, tmp_path / "second", training_step=3)
    assert contents(first) == contents(second)


def test_manifest_says_what_the_tensors_belong_to(tmp_path):
    folder = save_adapter(injected(), tmp_path / "adapter", training_step=42)
    manifest = read_manifest(folder)
    assert (manifest["host"], manifest["precision"], manifest["training_step"]) == ("toy", "fp32_state", 42)
    site = manifest["sites"][1]
    assert (site["site"], site["config"]["rate"], site["config"]["gate"]) == ("layers.1.sequence", 0.25, {"init": 0.5})
    assert {"plugin", "distribution", "version"} <= site.keys()
    assert set(load_file(folder / TENSORS)) == {name for name, _ in injected().named_parameters()}


def test_saving_replaces_an_older_adapter(tmp_path):
    folder = save_adapter(injected(ToyConfig(layers="1")), tmp_path / "adapter", training_step=1)
    save_adapter(injected(), folder, training_step=2)
    assert read_manifest(folder)["training_step"] == 2
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"], "nothing else is left"


def test_parent_folders_are_made(tmp_path):
    assert save_adapter(injected(), tmp_path / "run" / "step-1" / "adapter").is_dir()


def test_adapter_is_readable_for_whom_a_new_folder_is(tmp_path):
    (tmp_path / "plain").mkdir()
    folder = save_adapter(injected(), tmp_path / "adapter")
    assert stat.S_IMODE(folder.stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


def test_policy_registered_under_another_name_round_trips(tmp_path):
    registry = toy_registry()
    registry.register("precision_policy", "ours", PrecisionPolicy(name="theirs"))
    injection = injected(policy=registry.policy("ours"), registry=registry)
    folder = save_adapter(injection, tmp_path / "adapter")
    load_adapter(ToyModel(), folder, registry=registry)


# ---- saving that fails


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()], ids=["disk full", "interrupted"])
@pytest.mark.parametrize("existing", [False, True], ids=["new", "existing"])
@pytest.mark.parametrize("function", ["adapter_folder.save_file", "atomic._sync"])
def test_failed_write_leaves_what_was_there(tmp_path, monkeypatch, function, existing, error):
    folder = tmp_path / "adapter"
    if existing:
        save_adapter(injected(ToyConfig(layers="1")), folder, training_step=1)
    before = contents(folder) if existing else None

    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(f"moshi_ttt.core.{function}", fail)
    with pytest.raises(type(error)):
        save_adapter(injected(), folder, training_step=2)
    assert [path.name for path in tmp_path.iterdir()] == (["adapter"] if existing else [])
    if existing:
        assert contents(folder) == before


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()], ids=["disk full", "interrupted"])
@pytest.mark.parametrize("call", [1, 2], ids=["first rename", "second rename"])
def test_failed_swap_leaves_the_old_adapter(tmp_path, monkeypatch, call, error):
    folder = save_adapter(injected(ToyConfig(layers="1")), tmp_path / "adapter", training_step=1)
    before, calls, rename = contents(folder), [], os.rename

    def fail_once(source: Any, target: Any) -> None:
        calls.append(source)
        if len(calls) == call:
            raise error
        rename(source, target)

    monkeypatch.setattr(os, "rename", fail_once)
    with pytest.raises(type(error)):
        save_adapter(injected(), folder, training_step=2)
    assert folder.is_dir(), f"the old adapter is gone; the folder holds {[p.name for p in tmp_path.iterdir()]}"
    assert contents(folder) == before
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"], "no temporary folder is left"


def test_folder_that_is_no_adapter_is_not_overwritten(tmp_path):
    folder = tmp_path / "thesis"
    folder.mkdir()
    (folder / "chapter1.txt").write_text("years of work")
    with pytest.raises(AdapterError, match=r"thesis exists and is not an adapter; choose another folder"):
        save_adapter(injected(), folder)
    assert contents(folder) == {"chapter1.txt": b"years of work"}
    file = tmp_path / "notes.txt"
    file.write_text("")
    with pytest.raises(AdapterError, match="not an adapter"):
        save_adapter(injected(), file)


# ---- loading what is damaged or does not fit


def edit(folder: Path, **changes: Any) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(manifest | changes))


def edit_sites(folder: Path, change: Any) -> None:
    sites = json.loads((folder / MANIFEST).read_text())["sites"]
    for site in sites:
        change(site)
    edit(folder, sites=sites)


def edit_tensors(folder: Path, change: Any) -> None:
    tensors = load_file(folder / TENSORS)
    change(tensors)
    save_file(tensors, folder / TENSORS)


def truncate(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


GATE = "layers.1.sequence.gate"
DAMAGE: dict[str, tuple[Any, str]] = {
    "no folder": (lambda f: f.rename(f.with_name("moved")), "There is no folder"),
    "no manifest": (lambda f: (f / MANIFEST).unlink(), "no adapter.json"),
    "no tensors": (lambda f: (f / TENSORS).unlink(), "is missing"),
    "truncated tensors": (lambda f: truncate(f / TENSORS, 300), "truncated or damaged"),
    "truncated header": (lambda f: truncate(f / TENSORS, 4), "truncated or damaged"),
    "empty tensors": (lambda f: truncate(f / TENSORS, 0), "truncated or damaged"),
    "truncated manifest": (lambda f: truncate(f / MANIFEST, 40), "damaged"),
    "not JSON": (lambda f: (f / MANIFEST).write_text("yes"), "damaged"),
    "not text": (lambda f: (f / MANIFEST).write_bytes(b"\xff\xfe\x00"), "damaged"),
    "JSON list": (lambda f: (f / MANIFEST).write_text("[]"), "incomplete"),
    "incomplete": (lambda f: (f / MANIFEST).write_text('{"format_version": 1}'), "incomplete"),
    "format version": (lambda f: edit(f, format_version=99), "format version 99, this version reads 2"),
    "fingerprint": (lambda f: edit(f, fingerprint={"dim": 512}), "another base model: dim: adapter 512, model 8"),
    "fingerprint null": (lambda f: edit(f, fingerprint=None), "adapter"),
    "unknown host": (lambda f: edit(f, host="whisper"), "whisper"),
    "unknown policy": (lambda f: edit(f, precision="fp8"), "fp8"),
    "sites null": (lambda f: edit(f, sites=None), "adapter"),
    "site without config": (lambda f: edit_sites(f, lambda s: s.pop("config")), "config"),
    "site unreadable": (lambda f: edit_sites(f, lambda s: s.update(site="everywhere")), "adapter"),
    "site not in the model": (lambda f: edit_sites(f, lambda s: s.update(site="layers.40.sequence")), "out of range"),
    "variant": (lambda f: edit_sites(f, lambda s: s["config"].update(variant="gone")), "Unknown block 'gone'"),
    "unknown option": (lambda f: edit_sites(f, lambda s: s["config"].update(speed=3)), "unknown key 'speed'"),
    "missing tensor": (lambda f: edit_tensors(f, lambda t: t.pop(GATE)), f"missing {GATE}"),
    "unexpected tensor": (lambda f: edit_tensors(f, lambda t: t.update(x=torch.ones(1))), "unexpected x"),
    "shape": (lambda f: edit_tensors(f, lambda t: t.update({GATE: torch.ones(9)})), rf"{GATE}: expected \[8\].*\[9\]"),
    "dtype": (
        lambda f: edit_tensors(f, lambda t: t.update({GATE: torch.ones(8).bfloat16()})),
        f"{GATE}: expected .*float32, the file has .*bfloat16",
    ),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE)
def test_damaged_adapter_is_refused_and_the_model_untouched(tmp_path, damage, message):
    folder = save_adapter(injected(), tmp_path / "adapter")
    damage(folder)
    model = ToyModel()
    with Untouched(model), pytest.raises(AdapterError, match=message):
        load_adapter(model, folder, registry=toy_registry())


def test_all_tensor_problems_are_in_one_error(tmp_path):
    folder = save_adapter(injected(), tmp_path / "adapter")
    edit_tensors(folder, lambda t: (t.pop(GATE), t.update(x=torch.ones(1), y=torch.ones(1))))
    with pytest.raises(AdapterError, match=f"missing {GATE}; unexpected x; unexpected y"):
        load_adapter(ToyModel(), folder, registry=toy_registry())


def test_other_base_weights_are_refused(tmp_path):
    folder = save_adapter(injected(), tmp_path / "adapter")
    model = ToyModel(seed=1)
    with Untouched(model), pytest.raises(AdapterError, match="made for another base model: weights"):
        load_adapter(model, folder, registry=toy_registry())


def test_model_of_another_family_is_refused(tmp_path):
    folder = save_adapter(injected(), tmp_path / "adapter")
    with pytest.raises(MoshiTTTError):
        load_adapter(torch.nn.Linear(8, 8), folder, registry=toy_registry())


def test_model_that_has_blocks_is_refused(tmp_path):
    injection = injected()
    folder = save_adapter(injection, tmp_path / "adapter")
    with Untouched(injection.model), pytest.raises(AdapterError, match="already has blocks"):
        load_adapter(injection.model, folder, registry=toy_registry())


def test_missing_plugin_is_named_with_its_distribution(tmp_path, site_folder, blocks):
    site_folder.install("acme-ttt", {"acme": blocks("acme_memory")}, version="2.3")
    registry = toy_registry()
    registry.discover(site_folder.entry_points())
    folder = save_adapter(injected(AnyNameConfig(variant="acme_memory"), registry=registry), tmp_path / "adapter")
    assert read_manifest(folder)["sites"][0]["distribution"] == "acme-ttt"
    model = ToyModel()
    with Untouched(model), pytest.raises(AdapterError, match=r"acme_memory.*acme-ttt 2\.3|acme-ttt 2\.3.*acme_memory"):
        load_adapter(model, folder, registry=toy_registry())


def test_variant_whose_parameters_changed_is_refused(tmp_path):
    class Wider(ToyBlock):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            self.more = torch.nn.Parameter(torch.empty(3, device=self.info.device))

    folder = save_adapter(injected(ToyConfig(layers="1")), tmp_path / "adapter")
    registry, model = toy_registry(), ToyModel()
    with (
        registry.override("block", "toy", Wider),
        Untouched(model),
        pytest.raises(AdapterError, match=r"missing layers\.1\.sequence\.more"),
    ):
        load_adapter(model, folder, registry=registry)


def test_model_without_storage_is_refused(tmp_path):
    folder = save_adapter(injected(), tmp_path / "adapter")
    manifest = read_manifest(folder)
    edit(folder, fingerprint=manifest["fingerprint"] | {"weights": None})

    class MetaHost(type(toy_registry().host("toy"))):  # type: ignore[misc]
        def fingerprint(self, model: torch.nn.Module) -> dict[str, Any]:
            return {"dim": 8, "layers": 4, "weights": None}

    registry = toy_registry()
    with registry.override("host", "toy", MetaHost()), pytest.raises(MoshiTTTError, match="meta"):
        load_adapter(ToyModel(device="meta"), folder, registry=registry)


# ---- how often a block is built


class Counted(ToyBlock):
    built: list[str]

    def __init__(self, config, info, roles):
        super().__init__(config, info, roles)
        self.built.append(info.device.type)


def test_loading_builds_each_block_once_and_once_for_the_plan(tmp_path):
    registry = registry_of(Counted)
    Counted.built = []
    saved = injected(AnyNameConfig(variant="buffered", layers="1,2"), registry=registry)
    save_adapter(saved, tmp_path / "adapter")
    Counted.built.clear()
    loaded = load_adapter(ToyModel(), tmp_path / "adapter", registry=registry)
    assert Counted.built == ["meta", "meta", "cpu", "cpu"]
    Counted.built.clear()
    fill_from_adapter(loaded, tmp_path / "adapter", registry=registry)
    assert Counted.built == []
