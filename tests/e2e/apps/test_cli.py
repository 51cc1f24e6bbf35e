"""The surface of the command line, and the commands that take seconds: plugins, explain, verify."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
import typer.main
from safetensors import safe_open
from safetensors.torch import save_file

from moshi_ttt.apps.cli import app
from moshi_ttt.configs.paths import packaged_configs
from moshi_ttt.configs.reading import read_config
from moshi_ttt.core.registry import Registry

from .conftest import GOLDENS

PACKAGED = sorted(packaged_configs())
ONE_OF_7B = "moshi-7b-ttt-mlp"


def test_the_surface_is_frozen():
    def options(command):
        if hasattr(command, "commands"):
            return {name: options(inner) for name, inner in command.commands.items()}
        return sorted(option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts))

    group = typer.main.get_command(app)
    surface = options(group)
    assert surface == {
        "quickstart": [
            "--audio", "--config", "--out", "--overwrite", "--seed", "--steps", "--threads", "-c", "-o",
        ],
        "train": ["--plan", "--ranks", "config", "overrides"],
        "evaluate": {
            "compare": ["--out", "--overwrite", "-o", "folders"],
            "long-context": [
                "--adapter", "--batch-size", "--data", "--every", "--layout", "--max-seconds", "--moshi-channel",
                "--out", "--overwrite", "--seed", "--segments", "--spans", "--speaker-label", "--threads", "--window",
                "-a", "-d", "-o", "config",
            ],
            "recall": [
                "--adapter", "--batch-size", "--between", "--clips", "--data", "--frames", "--interludes", "--layout",
                "--moshi-channel", "--out", "--overwrite", "--pieces", "--seed", "--speaker-label", "--threads",
                "--volume", "-a", "-d", "-o", "config",
            ],
            "inner-loop": [
                "--adapter", "--batch-size", "--data", "--layout", "--max-seconds", "--moshi-channel", "--out",
                "--overwrite", "--smooth", "--speaker-label", "--threads", "-a", "-d", "-o", "config",
            ],
            "zero-shot": [
                "--adapter", "--codebooks", "--dataset", "--normalisation", "--normalization", "--out", "--overwrite",
                "--seed", "--source", "--threads", "-a", "-o", "config",
            ],
        },
        "encode": ["--eval", "--out", "-o", "config", "overrides"],
        "doctor": ["--adapter", "--batches", "--json", "--length", "--seed", "--threads", "config"],
        "explain": ["--json", "config"],
        "generate": [
            "--adapter", "--config", "--inner-loss", "--memory-in", "--memory-out", "--no-updates", "--out",
            "--overwrite", "--seed", "--slots", "--stereo", "--temp", "--temp-text", "--threads", "--top-k",
            "--top-k-text", "--updates", "--user-channel", "--volume", "-a", "-c", "-o", "recordings",
        ],
        "serve": [
            "--adapter", "--allow-origin", "--host", "--idle-sec", "--insecure", "--memories", "--memories-days",
            "--memories-gib", "--memories-per-owner", "--memory-precision", "--port", "--request-sec", "--resume-sec",
            "--seed", "--slots", "--threads", "--tls-cert", "--tls-key", "--token-file", "--waiting", "-a", "config",
        ],
        "new-plugin": ["--out", "-o", "name"],
        "plugins": ["--check"],
        "info": ["--json"],
        "completion": ["shell"],
        "verify": ["--all", "--backend", "paths"],
    }  # fmt: skip
    assert [option for parameter in group.params for option in parameter.opts] == ["--version"]


HEAVY = {
    "torch", "moshi", "numpy", "matplotlib", "yaml", "pluggy", "safetensors", "sphn", "aiohttp",
    "prometheus_client", "huggingface_hub", "sentencepiece",
}  # fmt: skip
"""What ``--help`` needs none of: each takes from tens of milliseconds to seconds to import.

Pydantic is not among them: some versions of typer read options with it.
"""
LIBRARIES = {"data", "evaluation", "hosts", "models", "plugins", "serving", "testing", "training"}
"""Parts of the package that only a command that runs may import."""


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], ["train", "--help"], ["evaluate", "recall", "--help"]]
)
def test_help_imports_nothing_heavy(arguments):
    program = (
        f"import sys, runpy; sys.argv = ['moshi-ttt', *{arguments}]\n"
        "try: runpy.run_module('moshi_ttt.apps.cli', run_name='__main__')\n"
        "except SystemExit: pass\n"
        "print('modules:', *sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    said, _, modules = done.stdout.rpartition("modules:")
    imported = set(modules.split())
    assert "typer" in imported
    assert HEAVY & imported == set()
    assert LIBRARIES & {name.split(".")[1] for name in imported if name.startswith("moshi_ttt.")} == set()
    if arguments == ["--help"]:
        for command in ("quickstart", "explain", "plugins", "info", "verify"):
            assert command in said


def test_import_moshi_ttt_imports_nothing_heavy():
    program = "import sys, moshi_ttt; dir(moshi_ttt); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    imported = set(done.stdout.split())
    assert "moshi_ttt" in imported
    assert (HEAVY | {"typer", "rich", "pydantic"}) & imported == set()
    assert {name for name in imported if name.startswith("moshi_ttt.")} == set()


def test_version(cli):
    assert cli("--version").said.startswith("moshi-ttt 0.")


@pytest.mark.parametrize("command", ["quickstart", "explain", "plugins", "verify"])
def test_every_command_has_help(cli, command):
    result = cli(command, "--help")
    assert result.exit_code == 0
    assert len(result.said) > 150


def test_unknown_command_is_refused(cli):
    result = cli("quikstart")
    assert result.exit_code == 2
    assert "quikstart" in result.said


def test_plugins_lists_names_versions_and_status(cli):
    result = cli("plugins")
    assert result.exit_code == 0
    for name in ("ttt_linear", "ttt_mlp", "moshi", "fp32_state", "sequence", "loaded", "moshi-ttt"):
        assert name in result.said


def test_plugins_shows_what_failed_and_why(cli, monkeypatch):
    class Broken:
        name, dist = "broken", None

        def load(self):
            raise ImportError("no module named 'their_kernels'")

    registry = Registry()
    with pytest.warns(UserWarning, match="their_kernels"):
        registry.discover([Broken()])
    monkeypatch.setattr("moshi_ttt.core.registry._default", registry)
    result = cli("plugins")
    assert result.exit_code == 0
    assert "broken: failed: ImportError: no module named 'their_kernels'" in result.said


def test_plugins_check_uses_every_target(cli):
    result = cli("plugins", "--check")
    assert result.exit_code == 0, result.said
    assert re.search(r"All \d\d+ targets can be used", result.said)


def test_plugins_check_fails_with_reasons(cli, monkeypatch):
    registry = Registry()
    registry.register_block("lazy", config="no_such_module:Config", block="no_such_module:Block")
    registry.register("host", "odd", "math:pi")
    monkeypatch.setattr("moshi_ttt.core.registry._default", registry)
    assert cli("plugins").exit_code == 0
    result = cli("plugins", "--check")
    assert result.exit_code == 1
    said = " ".join(result.said.split())
    assert "block 'lazy'" in said
    assert "No module named 'no_such_module'" in said
    assert "host 'odd'" in said
    assert "expected HostModel" in said
    assert "can be used" not in said


def test_as_a_program_errors_go_to_stderr_with_the_exit_code(tmp_path):
    (tmp_path / "bad.safetensors").write_bytes(b"garbage")
    command = [sys.executable, "-m", "moshi_ttt.apps.cli", "verify", "bad.safetensors"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("Error: bad.safetensors cannot be read as safetensors")


# ---- configs and explain


# Models of 7B shapes take a second each.
@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.exhaustive] if "7b" in n and n != ONE_OF_7B else []) for n in PACKAGED],
)
def test_every_packaged_config_loads_and_can_be_explained(cli, name):
    assert read_config(name).ttt
    result = cli("explain", name)
    assert result.exit_code == 0, result.said
    for word in ("parameters", "per stream", "fp32_state", "float32"):
        assert word in result.said


def test_explain_counts_the_7b_plan_exactly(cli):
    figures = json.loads(cli("explain", "moshi-7b-ttt-mlp", "--json").stdout)
    text = json.dumps(figures)
    assert "214474944" in text
    assert "71491648" in text
    assert "7687729152" in text


BAD_CONFIGS = {
    "unknown variant": ("variant: ttt_mpl, layers: all", "'ttt_mpl'. Did you mean 'ttt_mlp'"),
    "unknown key": ("variant: ttt_mlp, layers: all, chunks: 8", "'chunks'. Did you mean 'chunk'"),
    "unknown nested key": ("variant: ttt_mlp, layers: all, gate: {inti: 0.1}", "'gate.inti'. Did you mean 'init'"),
    "layer out of range": ("variant: ttt_mlp, layers: '2,9'", "'9' is out of range; the layers are 0 to 3"),
    "layer spec": ("variant: ttt_mlp, layers: some", "cannot read 'some'. Allowed: none, all, middle"),
    "non-causal": ("variant: ttt_mlp, layers: all, causal: false", "is causal and this block is not"),
    "value": ("variant: ttt_mlp, layers: all, chunk: 0", "chunk = 0"),
}


@pytest.mark.parametrize("case", BAD_CONFIGS)
@pytest.mark.parametrize("command", ["explain", "quickstart"])
def test_a_bad_config_is_one_clear_error_and_writes_nothing(cli, tmp_path, command, case):
    entry, message = BAD_CONFIGS[case]
    config = tmp_path / "mine.yaml"
    config.write_text(f"host: {{name: moshi, hf_repo: 'builtin:tiny'}}\nttt:\n  - {{{entry}}}\n")
    result = cli("explain", config) if command == "explain" else cli("quickstart", "--config", config, "--out", "run")
    assert result.exit_code == 2
    assert message in result.said
    assert "Traceback" not in result.said
    assert [path.name for path in tmp_path.iterdir()] == ["mine.yaml"]


@pytest.mark.parametrize(
    ("host", "message"),
    [
        ("{name: mohsi, hf_repo: x}", "'mohsi'. Did you mean 'moshi'"),
        ("{name: moshi, hf_repo: /no/such/folder}", "neither an existing folder nor a repository name"),
        ("{name: moshi, hf_repo: 'builtin:huge'}", "builtin:tiny"),
        ("{name: moshi}", "'hf_repo' is required"),
    ],
)
def test_a_bad_host_is_one_clear_error(cli, tmp_path, host, message):
    config = tmp_path / "mine.yaml"
    config.write_text(f"host: {host}\nttt: [{{variant: ttt_mlp}}]\n")
    result = cli("explain", config)
    assert result.exit_code == 2
    assert message in result.said


def test_a_config_that_is_not_there_lists_the_packaged_ones(cli):
    result = cli("explain", "quickstrat")
    assert result.exit_code == 2
    assert "Did you mean 'quickstart'" in result.said


# ---- verify


@pytest.mark.exhaustive  # all of them pass below
@pytest.mark.parametrize("pattern", ["linear_*", "mlp_*", "hybrid_*", "in_place_*"])
def test_reference_vectors_pass(cli, pattern):
    files = sorted(GOLDENS.glob(f"{pattern}.safetensors"))
    assert len(files) >= 2
    result = cli("verify", *files)
    assert result.exit_code == 0, result.said
    assert "FAIL" not in result.said
    for column in ("float64", "float32", "max abs", "max rel", "PASS"):
        assert column in result.said


def test_all_shows_every_output_and_gradient(cli):
    result = cli("verify", "--all", GOLDENS / "mlp_causal.safetensors")
    for name in ("out.y", "out.weight.1", "grad.q", "grad.token_scale", "grad.bias.0"):
        assert name in result.said


def altered(path, target, change, **metadata_changes):
    with safe_open(path, framework="pt") as handle:
        tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
        metadata = handle.metadata()
    change(tensors)
    save_file(tensors, target, metadata={**metadata, **metadata_changes})
    return target


def test_a_file_that_no_verifier_takes_fails(cli, tmp_path):
    source, target = GOLDENS / "linear_causal.safetensors", tmp_path / "other.safetensors"
    result = cli("verify", altered(source, target, lambda tensors: None, activation="relu"))
    assert result.exit_code == 1
    assert "no installed verifier takes it" in result.said


def test_all_reference_vectors_pass(cli):
    result = cli("verify", GOLDENS)
    assert result.exit_code == 0, result.said
    assert "27 of 27 files pass" in result.said


@pytest.mark.parametrize("name", ["out.y", "out.weight.0", "grad.k", "grad.token_scale"])
def test_a_wrong_number_is_noticed(cli, tmp_path, name):
    def change(tensors):
        tensors[name].view(-1)[0] += 1e-6 * max(1.0, float(tensors[name].abs().max()))

    result = cli("verify", altered(GOLDENS / "linear_causal.safetensors", tmp_path / "wrong.safetensors", change))
    assert result.exit_code == 1
    assert name in result.said
    assert "FAIL" in result.said


def test_nan_is_noticed(cli, tmp_path):
    def change(tensors):
        tensors["out.y"].view(-1)[0] = float("nan")

    path = altered(GOLDENS / "mlp_causal.safetensors", tmp_path / "nan.safetensors", change)
    assert cli("verify", path).exit_code == 1


def test_other_vectors_than_the_shipped_ones(cli, tmp_path):
    """Another batch, length, chunk and width, computed here by the definition and written in the file format."""
    from moshi_ttt.plugins.hybrid.naive import naive_inner_loop

    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    inputs = {
        "q": draw(3, 1, 17, 6), "k": draw(3, 1, 17, 6), "v": draw(3, 1, 17, 6), "lr": draw(3, 1, 17).abs(),
        "token_scale": draw(7).abs(), "norm_weight": draw(1, 6), "norm_bias": draw(1, 6), "weight.0": draw(1, 6, 10),
        "bias.0": draw(1, 1, 10), "weight.1": draw(1, 10, 6), "bias.1": draw(1, 1, 6),
    }  # fmt: skip
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in inputs.items()}
    y, weights, biases = naive_inner_loop(
        *(leaves[n] for n in ("q", "k", "v", "lr", "token_scale", "norm_weight", "norm_bias")),
        [leaves["weight.0"], leaves["weight.1"]], [leaves["bias.0"], leaves["bias.1"]],
        chunk_size=7, eps=1e-6, causal=True,
    )  # fmt: skip
    cotangent = draw(*y.shape)
    (y * cotangent).sum().backward()
    tensors = {f"in.{name}": tensor for name, tensor in inputs.items()} | {
        "in.cotangent": cotangent,
        "out.y": y.detach(),
    }
    tensors |= {f"out.weight.{i}": w.detach() for i, w in enumerate(weights)}
    tensors |= {f"out.bias.{i}": b.detach() for i, b in enumerate(biases)}
    tensors |= {f"grad.{name}": leaf.grad for name, leaf in leaves.items()}
    metadata = {"op": "inner_loop", "chunk_size": "7", "layers": "2", "causal": "true", "norm_eps": "1e-6",
                "activation": "gelu_tanh", "source": "definition"}  # fmt: skip
    save_file({name: t.contiguous() for name, t in tensors.items()}, tmp_path / "other.safetensors", metadata=metadata)
    result = cli("verify", tmp_path)
    assert result.exit_code == 0, result.said
    assert "ttt_mlp-recurrent" in result.said


@pytest.mark.parametrize("content", [b"", b"no tensors here", b"\xff" * 100], ids=["empty", "text", "bytes"])
def test_a_file_that_is_no_safetensors_is_an_error(cli, tmp_path, content):
    (tmp_path / "bad.safetensors").write_bytes(content)
    result = cli("verify", tmp_path / "bad.safetensors")
    assert result.exit_code == 2
    assert "cannot be read as safetensors" in result.said


def test_tensors_that_are_no_vectors_are_an_error(cli, tmp_path):
    save_file({"a": torch.zeros(2)}, tmp_path / "other.safetensors")
    result = cli("verify", tmp_path / "other.safetensors")
    assert result.exit_code == 2
    assert "not a file of reference vectors" in result.said


@pytest.mark.parametrize("path", ["nowhere", "."])
def test_a_path_without_vectors_is_an_error(cli, path):
    result = cli("verify", path)
    assert result.exit_code == 2
    assert "no such file, or a folder without" in result.said


@pytest.mark.first_by_default
@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
def test_a_run_that_is_stopped_leaves_nothing_behind(tmp_path, stop):
    command = [sys.executable, "-m", "moshi_ttt.apps.cli", "quickstart", "--out", str(tmp_path / "run")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not list(tmp_path.iterdir()) and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(stop)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Interrupted. Nothing half-written was left behind." in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.exhaustive  # Ctrl-C in a run is tested above
@pytest.mark.first_by_default
@pytest.mark.parametrize("stop", ["SIGINT", "SIGTERM"])
def test_a_run_that_is_stopped_inside_an_exec_ends_with_the_code_of_an_interruption(tmp_path, stop):
    (tmp_path / "stopped.py").write_text(
        "import rich.console, rich.markup\n"  # a later exec would clear the trace of the first
        "from moshi_ttt.apps import cli, plugins\n"
        f"stop = 'import os, signal; os.kill(os.getpid(), signal.{stop}); print(1)'\n"
        "plugins.render = lambda registry: exec(stop)\n"
        "cli.main()\n"
    )
    command = [sys.executable, "-m", "stopped", "plugins"]  # python -m is what looks at that trace
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert done.returncode == 130
    assert "Interrupted." in done.stderr


@pytest.mark.exhaustive  # Ctrl-C in a run is tested above
@pytest.mark.first_by_default
# An alarm ends a long sleep. Windows has none, and an interruption waits for the end of a short one.
@pytest.mark.parametrize(
    ("lacks", "stop", "wait"),
    [
        ("", "os.kill(os.getpid(), signal.SIGTERM)", "time.sleep(60)"),
        (
            "del signal.SIGALRM, signal.setitimer\n",
            "signal.raise_signal(signal.SIGINT)",
            "[time.sleep(0.1) for _ in range(600)]",
        ),
    ],
    ids=["alarm", "no alarm"],
)
def test_a_run_that_is_stopped_inside_an_import_is_stopped_after_it(tmp_path, lacks, stop, wait):
    (tmp_path / "careless.py").write_text(f"import os, signal\ntry:\n    {stop}\n    done = True\nexcept:\n    pass\n")
    (tmp_path / "stopped.py").write_text(
        f"import signal, time\n{lacks}"
        "from moshi_ttt.apps import cli, plugins\n"
        f"def render(registry):\n    import careless\n    print(careless.done, flush=True)\n    {wait}\n"
        "plugins.render = render\n"
        "cli.main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "stopped", "plugins"], capture_output=True, text=True, timeout=120, cwd=tmp_path
    )
    assert done.returncode == 130, done.stderr
    assert done.stdout == "True\n"


def test_an_interruption_that_was_made_into_another_error_is_still_one(cli, monkeypatch):
    def render(registry):
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            raise RuntimeError("cannot infer") from None

    monkeypatch.setattr("moshi_ttt.apps.plugins.render", render)
    result = cli("plugins")
    assert result.exit_code == 130
    assert "Interrupted." in result.said


@pytest.mark.parametrize("value", ["-1", "4294967296", "1.5", "yes"])
def test_a_seed_that_is_none_is_refused(cli, tmp_path, value):
    path = tmp_path / "config.yaml"
    path.write_text(f"host: {{name: moshi, hf_repo: builtin:tiny}}\nseed: {value}\nttt: [{{variant: ttt_mlp}}]\n")
    result = cli("explain", path)
    assert result.exit_code == 2
    assert "seed" in result.said


def test_a_name_too_long_for_the_file_system_is_an_error(cli, tmp_path):
    result = cli("quickstart", "--out", tmp_path / ("x" * 300))
    assert result.exit_code == 2
    assert "too long" in result.said
