"""The front door: what ``moshi_ttt`` offers, that it is lazy, and that its errors say what is allowed."""

from __future__ import annotations

import importlib
import inspect
import io
import pkgutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import nn

import moshi_ttt
from moshi_ttt import (
    GateConfig,
    GatingMLPConfig,
    MoshiHostConfig,
    TTTConfig,
    TTTLinearConfig,
    TTTMLPConfig,
    TTTRidgeConfig,
    inject,
    load_model,
    parse_config,
)
from moshi_ttt.core.adapter import load_adapter, save_adapter
from moshi_ttt.core.config import BlockConfig, HostConfig
from moshi_ttt.core.errors import AdapterError, ConfigError, HostError, InjectionError, PluginError, UnknownNameError
from moshi_ttt.core.host_lookup import host_of
from moshi_ttt.core.injection import make_plan
from moshi_ttt.core.registry import default_registry
from moshi_ttt.core.testing.toy_host import ToyModel, toy_registry
from moshi_ttt.core.units import human_bytes
from moshi_ttt.hosts.audio.host import AudioHost, AudioHostConfig
from moshi_ttt.hosts.moshi.tiny import bundle_folder, random_tiny_lm
from tests.project import ROOT

VARIANTS = {"GatingMLPConfig", "TTTLinearConfig", "TTTMLPConfig", "TTTMultilayerConfig", "TTTRidgeConfig"}


def toy_model(num_layers: int = 4) -> ToyModel:
    return ToyModel(16, 2, num_layers=num_layers, dtype=torch.float32)


# ---- the names


def test_the_public_names_are_these():
    names = {
        "GateConfig", "Injection", "MoshiHostConfig", "MoshiTTTError", "Plan", "Registry", "TTTConfig", "__version__",
        "default_registry", "evaluation", "inject", "load_adapter", "load_config", "load_model", "make_plan",
        "parse_config", "save_adapter", "testing", "training",
    }  # fmt: skip
    assert set(moshi_ttt.__all__) == names | VARIANTS
    assert dir(moshi_ttt) == sorted(moshi_ttt.__all__)
    assert all(getattr(moshi_ttt, name) is not None for name in moshi_ttt.__all__)
    with pytest.raises(AttributeError, match=r"no attribute 'no_such'\.$"):
        moshi_ttt.no_such  # noqa: B018
    with pytest.raises(AttributeError, match=r"'TTTMlpConfig'\. Did you mean 'TTTMLPConfig'"):
        moshi_ttt.TTTMlpConfig  # noqa: B018


def test_a_star_import_gives_them_all():
    names: dict = {}
    exec("from moshi_ttt import *", names)
    assert names.keys() - {"__builtins__"} == set(moshi_ttt.__all__)


def test_the_version_is_the_distributions():
    assert moshi_ttt.__version__ == metadata.version("moshi-ttt")


def test_every_shipped_variant_exports_its_config():
    registry = default_registry()
    shipped = [e.name for e in registry.entries() if e.kind == "block" and e.provenance.distribution == "moshi-ttt"]
    classes = {registry.block(name).config_class.__name__: registry.block(name).config_class for name in shipped}
    assert classes.keys() == VARIANTS
    assert all(getattr(moshi_ttt, name) is config_class for name, config_class in classes.items())


def test_the_conformance_kit_has_a_public_name():
    from moshi_ttt import testing
    from moshi_ttt.core import testing as kit

    assert testing.__all__ == kit.__all__
    assert all(getattr(testing, name) is getattr(kit, name) for name in kit.__all__)


def run(program: str) -> str:
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_import_is_lazy():
    heavy = run(
        "import sys, moshi_ttt; dir(moshi_ttt); moshi_ttt.__version__\n"
        "print([n for n in sys.modules if n in ('torch', 'pydantic', 'moshi', 'rich', 'yaml', 'pluggy')"
        " or n.startswith('moshi_ttt.')])"
    )
    assert heavy.strip() == "[]"


@pytest.mark.exhaustive  # a process for five seconds; README's program finds them
def test_training_and_evaluation_are_found_without_a_further_import():
    found = run(
        "import moshi_ttt\n"
        "print(moshi_ttt.training.Trainer.__module__, moshi_ttt.evaluation.recall.evaluate.__module__,\n"
        "      *dir(moshi_ttt.evaluation))"
    )
    assert found.split() == [
        "moshi_ttt.training.trainer", "moshi_ttt.evaluation.recall",
        "between", "compare", "inner_loop", "long_context", "recall", "zero_shot",
    ]  # fmt: skip
    with pytest.raises(AttributeError, match=r"no attribute 'recal'\. Evaluations: between, .*recall"):
        moshi_ttt.evaluation.recal  # noqa: B018


@pytest.mark.exhaustive  # tests/unit/configs reads every config alike
def test_reading_a_config_imports_no_training_code():
    found = run(
        "import sys, moshi_ttt\n"
        "from moshi_ttt.configs.reading import read_config\n"
        "from moshi_ttt.configs.settings import read_settings\n"
        f"moshi_ttt.load_config({str(ROOT / 'configs' / 'tiny-ttt-mlp.yaml')!r})\n"
        "read_config('tiny-ttt-mlp'), read_settings('train-cpu', [])\n"
        "upper = ('training', 'evaluation', 'data', 'apps')\n"
        "print([n for n in sys.modules if n.split('.')[:1] == ['moshi_ttt'] and n.split('.')[1:2] and"
        " n.split('.')[1] in upper])"
    )
    assert found.strip() == "[]"


STEPS = {"moshi_ttt.core.adapter_fit", "moshi_ttt.core.planning"}
"""Modules of steps of ``load_adapter`` and ``make_plan``, which find the registry once for all steps."""


def required_registries() -> list[str]:
    """Public functions and methods of the package that cannot be called without a registry."""
    found = []
    for module in pkgutil.walk_packages(moshi_ttt.__path__, "moshi_ttt."):
        if module.name in STEPS or module.name.endswith("__main__") or ".moved" in module.name:
            continue
        names = vars(importlib.import_module(module.name))
        for holder in (names, *(vars(each) for each in names.values() if isinstance(each, type))):
            for name, each in holder.items():
                function = getattr(each, "__func__", each)
                if inspect.isfunction(function) and function.__module__ == module.name and name[0] != "_":
                    parameter = inspect.signature(function).parameters.get("registry")
                    if parameter is not None and parameter.default is inspect.Parameter.empty:
                        found.append(f"{module.name}.{function.__qualname__}")
    return sorted(set(found))


def test_a_registry_is_optional_wherever_one_is_taken():
    assert required_registries() == []


def test_a_config_is_imported_without_torch_and_without_other_plugins():
    found = run(
        "import sys, moshi_ttt; moshi_ttt.TTTMLPConfig\n"
        "print('torch' in sys.modules, sorted(n for n in sys.modules if n.startswith('moshi_ttt.plugins.ttt')))"
    )
    assert found.strip() == ("False ['moshi_ttt.plugins.ttt_mlp', 'moshi_ttt.plugins.ttt_mlp.config']")


@pytest.mark.slow
def test_mypy_knows_the_options(tmp_path: Path):
    program = tmp_path / "program.py"
    program.write_text(
        "import moshi_ttt\n"
        "model = moshi_ttt.load_model('builtin:tiny')\n"
        "config = moshi_ttt.TTTMLPConfig(layers='last:3', chunk=32, gate=moshi_ttt.GateConfig(init=0.1))\n"
        "ttt = moshi_ttt.inject(model, config, moshi_ttt.GatingMLPConfig(layers=0, chunk='20.5s'), seed=1)\n"
        "ttt.print_summary()\n"
        "version: str = moshi_ttt.__version__\n"
        "moshi_ttt.TTTMLPConfig(chunck=32)\n"
        "moshi_ttt.TTTMLPConfig(chunk='32')\n"
        "moshi_ttt.inject(model, {'variant': 'ttt_mlp'})\n"
        "moshi_ttt.testing.check_block('ttt_mlp', 3)\n"
    )
    result = subprocess.run(
        [sys.executable, "-m", "mypy", "--config-file", ROOT / "pyproject.toml", str(program)],
        capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    lines = [int(line.split(":")[1]) for line in result.stdout.splitlines() if "error:" in line]
    assert sorted(set(lines)) == [7, 8, 9, 10], result.stdout + result.stderr


# ---- load_model


def test_the_tiny_moshi_by_name_and_by_folder():
    by_name, by_folder = load_model("builtin:tiny"), load_model(str(bundle_folder()))
    assert not by_name.training
    values = by_folder.state_dict()
    assert all(torch.equal(tensor, values[name]) for name, tensor in by_name.state_dict().items())
    assert next(load_model("builtin:tiny", dtype=torch.bfloat16).parameters()).dtype is torch.bfloat16


def test_a_model_by_its_hosts_configuration():
    model = load_model(AudioHostConfig(dim=32, num_layers=3))
    assert (model.dim, len(model.layers)) == (32, 3)
    assert next(load_model(MoshiHostConfig(hf_repo="builtin:tiny", dtype="bfloat16")).parameters()).dtype == (
        torch.bfloat16
    )


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        ("no/such/model", {}, HostError, r"neither an existing folder nor.*'owner/name'.*builtin:tiny"),
        ("moshiko", {}, HostError, r"'moshiko' is neither.*hub repository, or 'builtin:tiny'"),
        ("builtin:huge", {}, HostError, r"There is no 'builtin:huge': built in are 'builtin:tiny'"),
        ("builtin:tiny", {"host": "mosh"}, UnknownNameError, r"Unknown host 'mosh'\. Did you mean 'moshi'"),
        ("x", {"host": "audio"}, HostError, "'audio' loads no model by name.*'x'.*AudioHostConfig"),
        (AudioHostConfig(), {"host": "moshi"}, ConfigError, "for the host 'audio', not for 'moshi'"),
        (HostConfig(name="moshi"), {}, ConfigError, "takes a MoshiHostConfig, got a HostConfig"),
        (HostConfig(name="none"), {}, UnknownNameError, r"Unknown host 'none'.*Allowed: audio, moshi"),
        (Path("builtin:tiny"), {}, ConfigError, r"name of a model.*str\(path\)"),
    ],
)
def test_what_is_no_model_is_refused(name, options, error, message):
    with pytest.raises(error, match=message):
        load_model(name, **options)


def test_a_host_that_is_not_installed_is_named_with_those_that_are():
    registry = default_registry().copy()
    registry.unregister("host", "moshi")
    with pytest.raises(UnknownNameError, match=r"Unknown host 'moshi'.*Allowed: audio\."):
        load_model("builtin:tiny", registry=registry)


# ---- inject


def test_blocks_by_their_configs_are_those_of_the_whole_config(tmp_path):
    config = {
        "host": {"name": "moshi", "hf_repo": "builtin:tiny"}, "seed": 3,
        "ttt": [{"variant": "ttt_mlp", "layers": [1], "chunk": 4}, {"variant": "gating_mlp", "layers": 0, "chunk": 8}],
    }  # fmt: skip
    models = [random_tiny_lm(dtype=torch.float32) for _ in range(2)]
    whole = inject(models[0], parse_config(config))
    typed = inject(
        models[1], TTTMLPConfig(layers=(1,), chunk=4), GatingMLPConfig(layers=0, chunk=8), host="moshi", seed=3
    )
    assert [block.config for block in whole.plan.blocks] == [block.config for block in typed.plan.blocks]
    for (name, one), (other, two) in zip(whole.named_parameters(), typed.named_parameters(), strict=True):
        assert (name, one.tolist()) == (other, two.tolist())
    typed.remove()
    assert inject(models[1], TTTLinearConfig(layers=0), precision="fp32").plan.policy.name == "fp32"
    save_adapter(inject(load_model("builtin:tiny"), TTTMLPConfig(layers="1", chunk=4)), tmp_path / "adapter")
    assert [str(site) for site in load_adapter(load_model("builtin:tiny"), tmp_path / "adapter").blocks] == [
        "layers.1.sequence"
    ]


def test_wrong_options_are_config_errors_that_name_what_is_allowed():
    with pytest.raises(ConfigError, match=r"TTTMLPConfig: unknown key 'chunck'\. Did you mean 'chunk'\?"):
        TTTMLPConfig(chunck=3)
    with pytest.raises(ConfigError, match=r"TTTMLPConfig: chunk = 0: .*\nTTTMLPConfig: unknown key 'gate\.inti'"):
        TTTMLPConfig(chunk=0, gate={"inti": 1})
    with pytest.raises(ConfigError, match="MoshiHostConfig: 'hf_repo' is required"):
        MoshiHostConfig()
    assert TTTMLPConfig(gate={"init": 0.5}) == TTTMLPConfig(gate=GateConfig(init=0.5))


@pytest.mark.parametrize(
    ("configs", "options", "error", "message"),
    [
        ((), {}, ConfigError, r"block configurations.*or one TTTConfig .*; got none"),
        (({"variant": "ttt_mlp"},), {}, ConfigError, "got dict"),
        ((TTTMLPConfig(), TTTConfig(host=HostConfig(name="toy"))), {}, ConfigError, "got TTTMLPConfig, TTTConfig"),
        ((TTTConfig(host=HostConfig(name="toy")),), {"seed": 0}, ConfigError, "says host, precision and seed itself"),
        ((TTTConfig(host=HostConfig(name="toy")),), {"host": "toy"}, ConfigError, "leave those arguments out"),
        ((TTTMLPConfig(),), {"host": "toi"}, UnknownNameError, "Did you mean 'toy'"),
        ((TTTMLPConfig(),), {"precision": "fp23"}, UnknownNameError, "Did you mean 'fp32'"),
        ((TTTMLPConfig(),), {"host": "moshi"}, HostError, "LMModel"),
        ((BlockConfig(variant="ttt_mlp"),), {}, InjectionError, "it is a BlockConfig.*needs a TTTMLPConfig"),
        ((TTTMLPConfig(layers="last:9"),), {}, InjectionError, "needs a number from 1 to 4"),
    ],
)
def test_what_cannot_be_injected_is_refused_and_the_model_untouched(configs, options, error, message):
    model, registry = toy_model(4), toy_registry(default_registry())
    with pytest.raises(error, match=message):
        inject(model, *configs, registry=registry, **options)
    assert registry.host("toy").blocks(model) == {}


def test_the_host_of_a_model_is_found():
    registry = toy_registry(default_registry())
    assert host_of(toy_model(1), registry=registry).name == "toy"
    assert host_of(random_tiny_lm()).name == "moshi"
    assert host_of(load_model(AudioHostConfig())).name == "audio"


def test_a_model_of_no_host_and_of_two_hosts_is_refused():
    with pytest.raises(HostError, match=r"No host recognizes a Linear\. Hosts: audio, moshi\."):
        inject(nn.Linear(2, 2), TTTMLPConfig())

    class Other(AudioHost):
        name = "other"

    registry = default_registry().copy()
    registry.register("host", "other", Other())
    model = load_model(AudioHostConfig())
    with pytest.raises(HostError, match=r"Several hosts recognize this AudioDenoiser: audio, other\..*host="):
        inject(model, TTTMLPConfig(bidirectional=True), registry=registry)
    assert inject(model, TTTMLPConfig(bidirectional=True), host="other", registry=registry).host.name == "other"


def test_a_host_that_fails_is_named():
    class Failing(AudioHost):
        name = "failing"

        def sites(self, model):
            raise AttributeError("no layers")

    registry = default_registry().copy()
    registry.register("host", "failing", Failing())
    with pytest.raises(PluginError, match=r"'failing' failed at looking at a Linear: AttributeError: no layers.*host="):
        host_of(nn.Linear(2, 2), registry=registry)
    registry.unregister("host", "failing")
    registry.register("host", "broken", "no_such_module:HOST")
    assert host_of(load_model(AudioHostConfig()), registry=registry).name == "audio"
    with pytest.raises(HostError, match=r"No host recognizes a Linear\..*no_such_module"):
        host_of(nn.Linear(2, 2), registry=registry)


# ---- what is shown


@pytest.fixture
def ttt():
    registry = toy_registry(default_registry())
    model = toy_model(4)
    return inject(
        model, TTTMLPConfig(layers="last:1", chunk=5), GatingMLPConfig(layers=0, chunk="2s"), registry=registry
    )


def test_a_summary_says_site_variant_sizes_and_chunk(ttt):
    console = Console(width=120, record=True, file=io.StringIO())
    ttt.print_summary(console)
    text = console.export_text()
    base = sum(p.numel() for p in toy_model(4).parameters())
    assert f"base model: {base:,} parameters" in text
    assert f"{sum(p.numel() for p in ttt.parameters()):,}" in text
    for block, chunk in zip(ttt.plan.blocks, ("25", "5"), strict=True):
        (row,) = [line for line in text.splitlines() if str(block.site) in line]
        cells = [cell.strip() for cell in row.strip("│ ").split("│")]
        assert cells[:3] == [str(block.site), block.variant.name, f"{block.parameters:,}"]
        assert cells[4:] == [chunk, f"{int(chunk) / block.info.frame_rate:.2f}"]


@pytest.mark.parametrize("width", [48, 80])
def test_a_summary_in_a_narrow_terminal_leaves_nothing_out(ttt, width):
    console = Console(width=width, record=True, file=io.StringIO())
    ttt.print_summary(console)
    text = console.export_text()
    assert "\u2026" not in text
    rows = [line.strip("│").split("│") for line in text.splitlines() if line.startswith("│")]
    columns = ["".join(cell.strip() for cell in column) for column in zip(*rows, strict=True)]
    for block in ttt.plan.blocks:
        wanted = (str(block.site), block.variant.name, f"{block.parameters:,}", human_bytes(block.state_bytes))
        for column, said in zip(columns, wanted, strict=False):
            assert said.replace(" ", "") in column.replace(" ", "")


def test_a_host_without_seconds_shows_none(capsys):
    model = load_model(AudioHostConfig())
    inject(model, TTTMLPConfig(bidirectional=True, layers=0, chunk=7)).print_summary()
    (row,) = [line for line in capsys.readouterr().out.splitlines() if "layers.0.sequence" in line]
    assert [cell.strip() for cell in row.strip("│ ").split("│")][4:] == ["7", "-"]


def test_a_summary_of_blocks_that_were_removed_is_refused(ttt):
    ttt.remove()
    with pytest.raises(InjectionError, match="were removed"):
        ttt.print_summary()


def test_reprs_are_short(ttt):
    count = sum(parameter.numel() for parameter in ttt.parameters())
    assert repr(ttt).startswith(
        f"<Injection: gating_mlp at layers.0.feed_forward; ttt_mlp at layers.3.sequence of host toy, {count:,} "
    )
    assert repr(ttt.plan).startswith("<Plan: gating_mlp at")
    ttt.remove()
    assert len(repr(ttt)) < 200
    registry = toy_registry(default_registry())
    plan = make_plan(
        ttt.model, registry.host("toy"), [TTTLinearConfig()], policy=registry.policy("fp32_state"), registry=registry
    )
    assert "ttt_linear at 4 sites, layers.0.sequence to layers.3.sequence of host toy" in repr(plan)


def test_blocks_say_their_sizes_when_a_model_is_printed(ttt):
    for block in ttt.blocks.values():
        count = sum(parameter.numel() for parameter in block.parameters())
        chunk = 5 if block.info.site.layer == 3 else 25
        assert f"{block.info.site}, dim=16, num_heads=2, chunk={chunk}, parameters={count:,}" in repr(ttt.model)
    assert "(wq): Projection(16, 16)" in repr(ttt.model)


def test_ridge_says_its_chunk():
    registry = toy_registry(default_registry())
    made = inject(toy_model(1), TTTRidgeConfig(chunk=3), registry=registry)
    assert [block.chunk_tokens for block in made.plan.blocks] == [3]


def test_updates_have_one_switch(ttt):
    with pytest.raises(ValueError, match=r"above 0, got 0.*host\.updates\(model, False\)"):
        ttt.set_inner_lr_factor(0)


# ---- what a newcomer gets wrong


MISTAKES = {
    "no name": (lambda: TTTMLPConfig("last:3"), r"takes its options by name, and got 'last:3'.*allowed: .*layers"),
    "gate": (lambda: TTTMLPConfig(gate=0.1), r"TTTMLPConfig: gate = 0\.1: Give its options as a mapping.*init, alpha"),
    "layers": (lambda: TTTMLPConfig(layers=["1", "x"]), r"layers = \['1', 'x'\]: .*valid string, or a valid integer"),
    "length": (lambda: GatingMLPConfig(chunk=0), r"^GatingMLPConfig: chunk = 0: [^\n]*$"),
    "set": (lambda: setattr(TTTMLPConfig(), "chunk", 4), r"TTTMLPConfig\.chunk cannot be set to 4.*Make another"),
    "class": (lambda: inject(toy_model(), TTTMLPConfig), r"layers='last:3'.*got the class TTTMLPConfig"),
    "file": (lambda: inject(toy_model(), "a.yaml"), r"load_config reads one from a file\); got str"),
    "config": (lambda: parse_config("a.yaml"), r"'host' and 'ttt', got 'a\.yaml'\. load_config reads"),
    "absent": (lambda: moshi_ttt.load_config("absent.yaml"), r"Cannot read the config absent\.yaml.*Give the path"),
    "dtype": (lambda: load_model("builtin:tiny", dtype="float32"), r"got 'float32'\. Give.*as torch\.bfloat16"),
    "integers": (lambda: load_model("builtin:tiny", dtype=torch.int8), r"dtype: got torch\.int8\. Give a float"),
    "device": (lambda: load_model("builtin:tiny", device="gpu"), r"device: got 'gpu'\. Give 'cpu', 'cuda'"),
    "no path": (lambda: save_adapter("folder", toy_model()), r"path of a file.*got ToyModel\. Check the order"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_answered_with_what_is_allowed(mistake):
    make, message = MISTAKES[mistake]
    with pytest.raises(ConfigError, match=message):
        make()


def test_a_name_is_no_model(tmp_path):
    with pytest.raises(HostError, match=r"torch module, got 'builtin:tiny'\. load_model"):
        inject("builtin:tiny", TTTMLPConfig())
    with pytest.raises(AdapterError, match=r"into a model, got 'builtin:tiny'\. load_model"):
        load_adapter("builtin:tiny", tmp_path)
    (tmp_path / "file").write_text("")
    for place in (tmp_path, tmp_path / "file"):
        with pytest.raises(AdapterError, match=r"is not an adapter: it has no adapter\.json\. Give the folder that"):
            load_adapter(toy_model(), place)
    with pytest.raises(AdapterError, match=r"There is no folder .*absent\. Give the folder that save_adapter wrote"):
        load_adapter(toy_model(), tmp_path / "absent")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has the device")
def test_a_device_that_is_not_there_is_refused():
    with pytest.raises(ConfigError, match=r"device: got 'cuda', and this machine has no CUDA device\. Give 'cpu'"):
        load_model("builtin:tiny", device="cuda")


@pytest.mark.parametrize(
    "codes", [torch.zeros(1, 17, 5), torch.zeros(17, 5).long(), torch.zeros(1, 8, 5).long(), "codes"]
)
def test_codes_of_another_form_have_no_loss(codes):
    model = load_model("builtin:tiny")
    losses = host_of(model).losses()
    for loss in (losses.total, losses.by_position):
        with pytest.raises(HostError, match=r"codes \[B, 17, T\] int64, a row of text and 16 of audio, got"):
            loss(model, codes)
