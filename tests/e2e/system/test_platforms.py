"""Windows and macOS, simulated by what they lack: what works there, and what says that it cannot."""

from __future__ import annotations

import ast
import multiprocessing
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import yaml

from moshi_ttt import default_registry
from moshi_ttt.configs.settings import parse_settings, write_settings
from moshi_ttt.core.errors import ConfigError
from moshi_ttt.system import platforms
from moshi_ttt.training.logs import memory_bytes, summary
from moshi_ttt.training.runtime import start
from tests.project import ROOT, package_folders

# ---- memory


@pytest.mark.parametrize(
    ("platform", "held"), [("linux", 5_000 * 1024), ("freebsd14", 5_000 * 1024), ("darwin", 5_000)]
)
def test_the_unit_of_memory_is_the_platforms(monkeypatch, platform, held):
    usage = SimpleNamespace(ru_maxrss=5_000)
    fake = SimpleNamespace(RUSAGE_SELF=0, getrusage=lambda who: usage)
    monkeypatch.setitem(sys.modules, "resource", fake)
    monkeypatch.setattr(sys, "platform", platform)
    assert platforms.peak_memory() == held


def test_without_the_module_memory_is_unknown_and_left_out(monkeypatch):
    monkeypatch.setitem(sys.modules, "resource", None)
    assert memory_bytes(torch.device("cpu")) is None
    record = {
        "loss_text": 1.0, "loss_audio": 1.0, "gradient_norm": 1.0, "learning_rates": {}, "seconds": 1.0,
        "tokens_per_second": 1.0, "memory_bytes": None, "skipped": False,
    }  # fmt: skip
    assert "GiB" not in summary(record)
    assert "1.0 GiB" in summary({**record, "memory_bytes": 2**30})


# ---- processes


def test_data_workers_need_a_fork(monkeypatch):
    platforms.check_workers(2)
    monkeypatch.setattr(multiprocessing, "get_all_start_methods", lambda: ["spawn"])
    monkeypatch.setattr(sys, "platform", "win32")
    platforms.check_workers(0)
    with pytest.raises(ConfigError, match=r"data.num_workers is 2.*Windows cannot do. Set it to 0"):
        platforms.check_workers(2)


def test_training_on_cuda_needs_nccl(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: False)
    monkeypatch.setattr(sys, "platform", "win32")
    with (
        pytest.raises(ConfigError, match=r"NCCL, and this PyTorch for Windows has none.*WSL 2.*device: cpu"),
        start(None, None),
    ):
        raise AssertionError("joined")


# ---- text


@pytest.mark.exhaustive  # a process for seconds, and a terminal that few have
def test_a_terminal_without_the_letters_shows_others():
    environment = {**os.environ, "PYTHONIOENCODING": "ascii:strict", "PYTHONUTF8": "0"}
    done = subprocess.run(
        [sys.executable, "-m", "moshi_ttt", "explain", "tiny-ttt-linear"],
        env=environment,
        capture_output=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.decode("ascii")


def test_every_text_file_is_opened_with_an_encoding():
    """Windows' own is not UTF-8."""
    careless = []
    others = [ROOT / name for name in ("scripts", "benchmarks", "examples")]
    for folder in (*package_folders().values(), *others):
        for path in sorted(folder.rglob("*.py")):
            for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(call, ast.Call) and _opens_text(call):
                    careless.append(f"{path.relative_to(ROOT)}:{call.lineno}")
    assert careless == []


def _opens_text(call: ast.Call) -> bool:
    """Whether a call opens a file as text and leaves the encoding to the machine."""
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    owner = ast.unparse(call.func.value) if isinstance(call.func, ast.Attribute) else ""
    if any(keyword.arg == "encoding" for keyword in call.keywords):
        return False
    if name == "read_text":
        return not call.args
    if name == "write_text":
        return len(call.args) < 2
    if name != "open" or owner in ("os", "wave", "gzip", "tarfile", "zipfile", "Carry"):
        return False
    arguments = [*call.args, *(keyword.value for keyword in call.keywords)]
    return not any(isinstance(each, ast.Constant) and "b" in str(each.value) for each in arguments)


# ---- names of files


def test_names_that_every_system_can_keep_apart_are_allowed():
    platforms.check_file_names(["ttt", "in-place TTT, chunk 32", "TTT multi-layer (3)", "a.b", "ä", ".hidden"])


@pytest.mark.parametrize(
    "name", ["a:b", "a/b", "a\\b", "what?", "a*", "<a>", "", ".", "..", "a.", "a ", "nul", "COM1.x"]
)
def test_names_that_some_system_refuses_are_refused(name):
    with pytest.raises(ConfigError, match="is to name a folder"):
        platforms.check_file_names(["fine", name])


def test_names_that_are_one_on_some_system_are_refused(cli):
    with pytest.raises(ConfigError, match=r"'TTT' and 'ttt' are to name two folders"):
        platforms.check_file_names(["TTT", "lora", "ttt"])
    options = ["--data", "d", "--out", "o", "-a", "a=x"]
    result = cli("evaluate", "inner-loop", "tiny-ttt-mlp", *options, "-a", "A=y")
    assert (result.exit_code, "one on Windows and macOS" in result.said) == (2, True)
    assert "is to name a folder" in cli("evaluate", "inner-loop", "tiny-ttt-mlp", *options, "-a", "a:b=y").said


# ---- the home folder


def test_a_configs_folders_may_be_in_the_home(home):
    config = {
        "data": {"train_data": "~/data"}, "run_dir": "~/runs/a", "resume": "~/runs/b/checkpoints/checkpoint_000001",
        "adapter": "~/adapter", "moshi_paths": {"hf_repo_id": "builtin:tiny"},
        "ttt": [{"variant": "ttt_linear", "layers": "1"}],
    }  # fmt: skip
    run = parse_settings(config, registry=default_registry(), where="test").run
    assert run.run_dir == str(home / "runs" / "a")
    assert run.resume == str(home / "runs" / "b" / "checkpoints" / "checkpoint_000001")
    assert run.adapter == str(home / "adapter")


@pytest.mark.parametrize("key", ["run_dir", "resume", "adapter"])
def test_a_home_that_is_not_there_is_named(key):
    config = {
        "data": {"train_data": "a"}, "run_dir": "a", "moshi_paths": {"hf_repo_id": "builtin:tiny"},
        "ttt": [{"variant": "ttt_linear", "layers": "1"}], key: "~no-such-user/a",
    }  # fmt: skip
    with pytest.raises(ConfigError, match=rf"(?s){key}.*no home folder"):
        parse_settings(config, registry=default_registry(), where="test")


def test_an_option_names_a_home_that_is_not_there(cli):
    result = cli("quickstart", "--out", "~no-such-user/a")
    assert result.exit_code == 2
    assert "there is no home folder" in result.said


def test_args_yaml_holds_the_whole_path(home, tmp_path):
    config = {
        "data": {"train_data": "a"}, "run_dir": "~/run", "moshi_paths": {"hf_repo_id": "builtin:tiny"}, "threads": 2,
        "ttt": [{"variant": "ttt_linear", "layers": "1"}],
    }  # fmt: skip
    write_settings(parse_settings(config, registry=default_registry(), where="test"), tmp_path / "args.yaml")
    written = yaml.safe_load((tmp_path / "args.yaml").read_text())
    assert (written["run_dir"], written["threads"]) == (str(home / "run"), 2)
