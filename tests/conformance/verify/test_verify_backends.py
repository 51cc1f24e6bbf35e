"""``moshi-ttt verify --backend``: the forms in C++ pass on every file they take, and they alone compute it."""

from __future__ import annotations

import shutil

import pytest

from moshi_ttt import default_registry
from moshi_ttt.apps.verify import verify_file
from moshi_ttt.core.errors import ConfigError
from moshi_ttt.plugins.gating_mlp import compiled as gating
from moshi_ttt.plugins.hybrid import compiled
from moshi_ttt.plugins.hybrid.cpp import chunk
from moshi_ttt.plugins.ttt_ridge import compiled as ridge
from tests.project import ROOT

GOLDENS = ROOT / "tests" / "goldens"
TAKEN = {
    "linear_causal": {"ttt_linear-cpp", "ttt_linear-cpp_step"},
    "linear_causal_ragged": {"ttt_linear-cpp", "ttt_linear-cpp_step"},
    "linear_noncausal": {"ttt_linear-cpp"},
    "mlp_causal": {"ttt_mlp-cpp", "ttt_mlp-cpp_step"},
    "mlp_noncausal": {"ttt_mlp-cpp"},
    "multilayer3_causal": {"ttt_multilayer-cpp", "ttt_multilayer-cpp_step"},
    "hybrid_linear_causal": {"ttt_linear-cpp_hybrid"},
    "hybrid_mlp_noncausal": {"ttt_mlp-cpp_hybrid"},
    "hybrid_conv": {"ttt_linear-cpp_options", "ttt_linear-cpp_options_step"},
    "hybrid_value": {"ttt_linear-cpp_options", "ttt_linear-cpp_options_step"},
}
"""Every file of the published inner loop, and the verifiers that take it."""
STEPS = {
    **dict.fromkeys(("ridge", "ridge_decay", "ridge_novelty"), "ttt_ridge-cpp_step"),
    **dict.fromkeys(("in_place_no_proj", "in_place_proj"), "gating_mlp-cpp_step"),
    **dict.fromkeys(
        (
            "in_place_gate",
            "in_place_gradient",
            "in_place_ridge",
            "in_place_ridge_unit",
            "in_place_shipped",
            "in_place_start",
        ),
        "gating_mlp-options_cpp_step",
    ),
}
"""Every file of a variant that has a step in C++ alone, and the verifier that takes it."""
OTHERS = sorted({path.stem for path in GOLDENS.glob("*.safetensors")} - TAKEN.keys() - STEPS.keys())
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++ here")


def verified(name, backend=None):
    return verify_file(GOLDENS / f"{name}.safetensors", default_registry(), backend)


@needs_compiler
@pytest.mark.parametrize("name", TAKEN)
def test_cpp_passes_on_every_file_it_takes(name):
    report = verified(name, "cpp")
    assert {each.verifier for each in report.comparisons} == TAKEN[name]
    assert {str(each.dtype) for each in report.comparisons} == {"torch.float64", "torch.float32"}
    assert report.passed, [each for each in report.comparisons if not each.passed]
    gradients = {each.name for each in report.comparisons if each.name.startswith("grad.")}
    assert {"grad.weight.0", "grad.bias.0"} <= gradients, "of the training call"


@needs_compiler
@pytest.mark.parametrize("name", STEPS)
def test_the_step_in_cpp_passes_on_every_file_of_its_variant(name):
    report = verified(name, "cpp")
    assert {each.verifier for each in report.comparisons} == {STEPS[name]}
    assert {str(each.dtype) for each in report.comparisons} == {"torch.float64", "torch.float32"}
    assert report.passed, [each for each in report.comparisons if not each.passed]
    assert STEPS[name] not in {each.verifier for each in verified(name).comparisons}, "built where asked for"


@needs_compiler
@pytest.mark.parametrize("name", STEPS)
def test_nothing_else_computes_in_the_place_of_the_step(name, monkeypatch):
    step, in_place = ridge.compiled_ridge, gating.CompiledStepper.step

    def wrong_read(*given):
        read = step(*given)
        return read._replace(value=1.0001 * read.value)

    monkeypatch.setattr(ridge, "compiled_ridge", wrong_read)
    monkeypatch.setattr(
        gating.CompiledStepper, "step", lambda *given, **named: 1e-3 + in_place(*given, **named)
    )  # fmt: skip
    report = verified(name, "cpp")
    assert {each.verifier for each in report.comparisons if not each.passed} == {STEPS[name]}


@needs_compiler
@pytest.mark.parametrize("name", TAKEN)
def test_nothing_else_computes_in_the_place_of_cpp(name, monkeypatch):
    """With C++ forms that are a little wrong, every verifier of a file fails."""
    call, step = chunk.cpp_inner_loop, compiled.compiled_inner_loop

    def wrong(y):
        return y + 1e-6 * y.flip(-1)  # a factor alone would be lost in the post norm

    def wrong_call(*given, **options):
        y, state = call(*given, **options)
        return wrong(y), state

    monkeypatch.setattr(chunk, "cpp_inner_loop", wrong_call)
    monkeypatch.setattr(compiled, "compiled_inner_loop", lambda *given: wrong(step(*given)))
    report = verified(name, "cpp")
    assert {each.verifier for each in report.comparisons if not each.passed} == TAKEN[name]


@pytest.mark.parametrize("name", OTHERS)
def test_files_of_other_options_are_left_out(name):
    report = verified(name, "cpp")
    assert report.left_out
    assert report.comparisons == ()
    assert verified(name).comparisons, "the other backends take it"


def test_what_is_built_runs_only_where_it_is_asked_for():
    names = {each.verifier for each in verified("linear_causal").comparisons}
    assert names == {"ttt_linear-naive", "ttt_linear-chunk", "ttt_linear-recurrent"}
    assert {each.verifier for each in verified("linear_causal", "naive").comparisons} == {"ttt_linear-naive"}
    of_torch = {each.verifier for each in verified("linear_causal", "torch").comparisons}
    assert of_torch == {"ttt_linear-chunk", "ttt_linear-recurrent"}


def test_a_backend_that_no_form_has_is_refused():
    with pytest.raises(ConfigError, match=r"No form of the backend 'gpu' is compared. Backends: cpp, naive, torch"):
        verified("linear_causal", "gpu")


def test_without_a_compiler_it_is_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", str(tmp_path / "none"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(chunk, "operations", chunk.operations.__wrapped__)  # not what an earlier test loaded
    with pytest.raises(ConfigError, match="cannot be built"):
        verified("linear_noncausal", "cpp")


@needs_compiler
def test_the_command_counts_what_was_compared(cli):
    files = (str(GOLDENS / f"{name}.safetensors") for name in ("linear_causal", "hybrid_steps"))
    result = cli("verify", *files, "--backend", "cpp")
    assert result.exit_code == 0, result.said
    assert "1 of 1 files pass" in result.said
    assert "1 more have no form of this backend" in result.said


def test_the_command_fails_where_nothing_was_compared(cli):
    assert cli("verify", str(GOLDENS / "hybrid_steps.safetensors"), "--backend", "cpp").exit_code == 1
