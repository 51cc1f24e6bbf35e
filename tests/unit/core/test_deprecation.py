"""Names that moved: found under the earlier name with a warning, refused where there is none."""

from __future__ import annotations

import importlib
import pkgutil
import warnings
from dataclasses import dataclass

import pytest

from moshi_ttt.core.deprecation import moved_names, renamed_arguments, renamed_attributes


def test_an_earlier_name_is_the_new_object_with_a_warning():
    find = moved_names("old.place", "moshi_ttt.core.paths")
    with pytest.warns(DeprecationWarning, match=r"old\.place\.user_path is now moshi_ttt\.core\.paths\.user_path"):
        found = find("user_path")
    assert found is importlib.import_module("moshi_ttt.core.paths").user_path


@pytest.mark.parametrize("target", ["user_path", "moshi_ttt.core.paths:user_path"])
def test_a_renamed_name(target):
    find = moved_names("old.place", "moshi_ttt.core.paths", {"path_of": target})
    with pytest.warns(DeprecationWarning, match=r"old\.place\.path_of is now moshi_ttt\.core\.paths\.user_path"):
        assert find("path_of") is importlib.import_module("moshi_ttt.core.paths").user_path


@pytest.mark.parametrize("name", ["nothing", "__path__"])
def test_a_name_that_never_was(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(AttributeError, match=f"module 'old.place' has no attribute '{name}'"):
            moved_names("old.place", "moshi_ttt.core.paths")(name)


def test_a_module_of_which_some_names_have_moved():
    find = moved_names("old.place", None, {"path_of": "moshi_ttt.core.paths:user_path"})
    with pytest.warns(DeprecationWarning, match=r"old\.place\.path_of is now moshi_ttt\.core\.paths\.user_path"):
        find("path_of")
    with pytest.raises(AttributeError, match="has no attribute 'user_path'"):
        find("user_path")


def test_a_name_that_no_evaluation_has_is_an_error():
    from moshi_ttt.evaluation import zero_shot

    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = zero_shot.nothing
    with pytest.warns(DeprecationWarning, match="is now"):
        assert zero_shot.Normalisation is zero_shot.Normalization


@renamed_arguments(pieces="clips")
def count(model, clips=1):
    return model, clips


@renamed_attributes(pieces="clips")
@dataclass(frozen=True)
class Counted:
    clips: int = 1


def test_an_argument_under_its_earlier_name():
    with pytest.warns(DeprecationWarning, match=r"argument 'pieces' of count\(\) is now 'clips'"):
        assert count("base", pieces=3) == ("base", 3)
    with pytest.raises(TypeError, match="got 'pieces' and 'clips', which are the same"):
        count("base", pieces=3, clips=3)
    with pytest.raises(TypeError, match="unexpected keyword argument 'bits'"):
        count("base", bits=3)


def test_an_attribute_under_its_earlier_name():
    with pytest.warns(DeprecationWarning, match=r"argument 'pieces' of Counted\.__init__\(\) is now 'clips'"):
        counted = Counted(pieces=3)
    with pytest.warns(DeprecationWarning, match=r"Counted\.pieces is now Counted\.clips") as shown:
        assert counted.pieces == 3
    assert shown[0].filename == __file__


def test_new_names_do_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert count("base", clips=3) == ("base", Counted(clips=3).clips)


EARLIER = {
    "common.block": ["HybridBlock", "Projection", "INIT_STD"],
    "common.block_checks": ["NARROWEST_HEAD", "checked_head_width"],
    "common.derivatives": ["differentiable_again"],
    "common.fast_network": ["FastNetwork", "UpdateRule", "teach", "key_pass", "query_pass", "after_chunk", "descend_"],
    "common.health": ["target_figures", "inner_losses", "red_flags"],
    "common.hybrid": ["Linear", "l2_normalise", "over_rms", "reconstruction_target", "inner_inputs", "gated_output"],
    "common.inner_loop": ["Tokens", "initial_state", "unpack", "pack", "run", "step"],
    "common.objective": ["Objective", "InnerNorm", "PlainLoss"],
    "common.options": ["GateConfig", "HybridConfig", "START_MOMENTUM"],
    "common.reference": ["inner_loop", "hybrid_inputs", "hybrid_output", "network", "layer_norm", "rotated"],
    "common.rope": ["rotate", "widths"],
    "common.verifiers": ["Reference", "Chunked", "Streamed", "Hybrid", "HybridReference"],
    "common.weight_maps": ["VideoDiT", "LanguageModel"],
    "gating_mlp.gram": ["gram"],
    "gating_mlp.reference": ["in_place", "filtered", "writes"],
    "gating_mlp.streaming": ["Stepper"],
    "gating_mlp.ops": ["running_sum", "after_chunk", "prefers_gram"],
    "ttt_ridge.reference": ["memory", "layer", "success_gate", "cosine"],
}
"""Module of ``plugins`` -> names that it had, and that are elsewhere now."""


MOVED = {
    "core.injection": {"initialise_blocks": "core.injection.initialize_blocks"},
    "hosts.moshi.lora": {"initialise_lora": "hosts.moshi.lora.initialize_lora"},
    "data.manifest": {
        "SourceSpec": "data.sources", "parse_sources": "data.sources", "SHARD_INDEX": "data.sources",
        "check_share": "data.problems", "LISTED": "data.problems",
    },
    "evaluation.pieces": {"Piece": "evaluation.clips.Clip", "Row": "evaluation.clips", "heard_own": "evaluation.clips"},
    "evaluation.subjects": {
        "Subject": "evaluation.models.ModelUnderTest", "load_subjects": "evaluation.models.load_models",
        "listen": "evaluation.models.evaluate_codes", "CONDITIONS": "evaluation.models",
    },
    "evaluation.zero_shot": {"Normalisation": "evaluation.zero_shot.Normalization"},
    "hosts.moshi.fit": {
        "require_fit": "hosts.moshi.compatibility.require_compatible", "SpeechLayout": "hosts.moshi.compatibility",
    },
    "apps.quickstart.stream": {"listen": "apps.quickstart.stream.stream_recording"},
    "training.planning": {"render": "training.plan_tables", "groups_table": "training.plan_tables"},
}  # fmt: skip
"""Module -> names that it had -> where they are now."""


@pytest.mark.parametrize(
    ("module", "name", "place"), [(m, n, p) for m, names in MOVED.items() for n, p in names.items()]
)
def test_names_of_other_packages_that_moved(module, name, place):
    earlier = importlib.import_module(f"moshi_ttt.{module}")
    with pytest.warns(DeprecationWarning, match=rf"moshi_ttt\.{module}\.{name} is now moshi_ttt\.{place}"):
        assert getattr(earlier, name) is not None


@pytest.mark.parametrize("module", EARLIER)
def test_names_that_moved(module):
    earlier = importlib.import_module(f"moshi_ttt.plugins.{module}")
    for name in EARLIER[module]:
        with pytest.warns(DeprecationWarning, match=rf"plugins\.{module}\.{name} is now moshi_ttt\.plugins\."):
            found = getattr(earlier, name)
        assert getattr(found, "__module__", "moshi_ttt.plugins.").startswith("moshi_ttt.plugins.")


@pytest.mark.parametrize("name", ["common", "gating_mlp", "ttt_ridge"])
def test_every_module_that_moved_is_tried(name):
    package = importlib.import_module(f"moshi_ttt.plugins.{name}")
    own, moved = ({each.name for each in pkgutil.iter_modules([path])} for path in package.__path__)
    assert moved
    assert {f"{name}.{each}" for each in moved} <= EARLIER.keys()
    assert not own & moved, "a module of the same name would hide the earlier one"
