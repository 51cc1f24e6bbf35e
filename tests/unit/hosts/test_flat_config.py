"""The flat ``ttt:`` block of earlier code: what it means, and what it must not mean."""

from __future__ import annotations

import warnings

import pytest

from moshi_ttt import default_registry, parse_config
from moshi_ttt.core.errors import ConfigError
from moshi_ttt.hosts.moshi.flat_config import ELSEWHERE, KEYS, native_entries

HOST = {"name": "moshi", "hf_repo": "builtin:tiny"}
DEFAULTS = {"layers": "29,30,31", "chunk": 32, "base_lr": 1.0, "gate": {"init": 0.05}}


def read(flat):
    with pytest.warns(UserWarning, match="the flat ttt block is read as"):
        return parse_config({"host": HOST, "ttt": flat}, registry=default_registry()).ttt


def native(*entries):
    return parse_config({"host": HOST, "ttt": list(entries)}, registry=default_registry()).ttt


@pytest.mark.parametrize(
    ("flat", "entry"),
    [
        ({}, {"variant": "ttt_mlp", **DEFAULTS}),
        ({"enable": True, "ttt_mlp_layers": 1}, {"variant": "ttt_linear", **DEFAULTS}),
        (
            {"enabled": True, "layers": "last:3", "mini_batch_size": 16, "base_lr": 0.1, "initial_gating_alpha": 0.2},
            {"variant": "ttt_mlp", "layers": "last:3", "chunk": 16, "base_lr": 0.1, "gate": {"init": 0.2}},
        ),
        (
            {"ttt_base_lr": 0.5, "gating_alpha_init": 0.0, "ttt_mlp_layers": 2, "ttt_mlp_expansion_factor": 2.0},
            {"variant": "ttt_mlp", **DEFAULTS, "base_lr": 0.5, "gate": {"init": 0.0}, "expansion": 2},
        ),
        (
            {"ttt_mlp_layers": 4, "ttt_mlp_expansion_factor": 3},
            {"variant": "ttt_multilayer", **DEFAULTS, "depth": 4, "expansion": 3},
        ),
        (
            {"ttt_mlp_layers": 3, "ttt_mlp_hidden_dims": [64, 32], "ttt_mlp_expansion_factor": 4},
            {"variant": "ttt_multilayer", **DEFAULTS, "hidden_dims": [64, 32]},
        ),
        (
            {
                "layers": "middle", "chunk_size": 256, "learning_rate": 0.3, "conv_kernel_size": 5,
                "delta_clip_fro_norm": 1.0,
            },
            {"variant": "gating_mlp", "layers": "middle", "chunk": 256, "lr": 0.3, "conv_kernel": 5, "clip": 1.0},
        ),
        (
            {"chunk_size": 64, "delta_clip_fro_norm": None},
            {"variant": "gating_mlp", "layers": "29,30,31", "chunk": 64, "lr": 1e-3, "conv_kernel": 2},
        ),
    ],
    ids=str,
)  # fmt: skip
def test_a_flat_block_means_its_native_entry(flat, entry):
    assert read(flat) == native(entry)


@pytest.mark.parametrize("key", ["enable", "enabled"])
def test_a_disabled_block_injects_nothing(key):
    assert read({key: False, "layers": "all"}) == ()


def test_the_message_shows_the_native_form_and_what_is_not_part_of_it():
    entries, message = native_entries({"ttt_mlp_layers": 1, "persistent_states": True, "num_heads": 32}, "old.yaml")
    assert entries[0]["variant"] == "ttt_linear"
    assert message.startswith("old.yaml: the flat ttt block is read as\nttt:\n")
    assert "- {variant: ttt_linear, layers: '29,30,31', chunk: 32" in message
    for key in ("persistent_states", "num_heads"):
        assert f"- {key}: {ELSEWHERE[key]}." in message
    assert "model_dim" not in message
    for flat in ({"ttt_mlp_layers": 1}, {"ttt_mlp_hidden_dims": [8]}):
        _, message = native_entries({**flat, "ttt_mlp_expansion_factor": 4}, "old.yaml")
        assert "- ttt_mlp_expansion_factor: without effect" in message


@pytest.mark.parametrize(
    ("flat", "message"),
    [
        ({"mini_batchsize": 3}, "unknown key 'mini_batchsize'. Did you mean 'mini_batch_size'"),
        ({"chunk_size": 8, "ttt_mlp_layers": 2}, "chunk_size ask for gating_mlp, and ttt_mlp_layers"),
        ({"chunk_size": 8, "mini_batch_size": 2}, "leave one group out"),
        ({"base_lr": 1.0, "ttt_base_lr": 0.1}, "are one option, and say 1.0 and 0.1"),
        ({"enable": True, "enabled": False}, "are one option"),
        ({"ttt_mlp_layers": 0}, "ttt_mlp_layers = 0"),
        ({"ttt_mlp_layers": "two"}, "ttt_mlp_layers = 'two'"),
        ({"ttt_mlp_layers": 3, "ttt_mlp_hidden_dims": [8]}, "one less than ttt_mlp_layers"),
        ({"initial_gating_alpha": 1.5}, "gate.init = 1.5"),
        ({"ttt_mlp_expansion_factor": 2.5}, "expansion = 2.5"),
        ({"mini_batch_size": 0}, "chunk = 0"),
        ({"enabled": "false"}, "enabled = 'false': give true or false"),
        ({"enable": False, "chunk_size": 8, "mini_batch_size": 2}, "leave one group out"),
        ({"variant": "ttt_mlp", "layers": "all"}, "write it as `ttt: [{variant: ttt_mlp, ...}]`"),
    ],
    ids=str,
)
def test_what_cannot_be_meant_is_refused(flat, message):
    config = {"host": HOST, "ttt": flat}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ConfigError) as caught:
            parse_config(config, registry=default_registry())
    assert message in str(caught.value)


def test_every_documented_key_is_known():
    listed = """enable enabled layers base_lr mini_batch_size persistent_states initial_gating_alpha ttt_mlp_layers
        ttt_mlp_expansion_factor ttt_mlp_hidden_dims log_inner_loop_losses inner_loop_log_interval save_inner_loop_plots
        inner_loop_plot_dir chunk_size learning_rate conv_kernel_size delta_clip_fro_norm model_dim num_heads
        ttt_base_lr gating_alpha_init gradient_checkpointing ttt_fig5_enable librilight_evaluation_mode layer_frequency
        start_layer unfreeze_ttt_layers yarn"""
    assert set(listed.split()) == KEYS


# ---- the source system's own in-place file


IN_PLACE_FILE = {
    "enabled": True, "layer_frequency": 6, "start_layer": 5, "chunk_size": 256, "learning_rate": 1e-3,
    "conv_kernel_size": 2, "unfreeze_ttt_layers": False, "yarn": {"enable": False}, "delta_clip_fro_norm": None,
}  # fmt: skip


def entries_of(**changes):
    return native_entries({**IN_PLACE_FILE, **changes}, "c.yaml")[0]


def test_the_source_systems_in_place_file_loads():
    assert entries_of() == [
        {"variant": "gating_mlp", "layers": "every:6@5", "chunk": 256, "lr": 1e-3, "conv_kernel": 2}
    ]


@pytest.mark.parametrize(
    ("changes", "layers"),
    [
        ({"start_layer": None}, "every:6@0"), ({"layer_frequency": None}, "every:1@5"),
        ({"layer_frequency": None, "start_layer": None}, "29,30,31"),
        ({"layer_frequency": None, "start_layer": None, "layers": "middle"}, "middle"),
    ],
)  # fmt: skip
def test_frequency_and_start_are_layers(changes, layers):
    assert entries_of(**changes)[0]["layers"] == layers


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": "1,2"}, "layers says which layers, and so do layer_frequency and start_layer. Leave one out"),
        ({"layer_frequency": 0}, "layer_frequency = 0: give a whole number of 1 or more"),
        ({"layer_frequency": True}, "layer_frequency = True"), ({"start_layer": -1}, "start_layer = -1"),
        ({"start_layer": "5"}, "start_layer = '5'"),
        ({"unfreeze_ttt_layers": True}, "train_w_down: true"),
        ({"unfreeze_ttt_layers": [1, 2]}, "train_w_down: true"),
        ({"yarn": {"enable": True, "factor": 4}}, "yarn = .* Leave it out"), ({"yarn": {"factor": 4}}, "yarn"),
    ],
)  # fmt: skip
def test_what_it_asks_for_and_cannot_have_is_refused_in_words(changes, message):
    with pytest.raises(ConfigError, match=message):
        entries_of(**changes)


@pytest.mark.parametrize("off", [False, None, "", {}, [], 0, {"enabled": False, "factor": 4}])
def test_what_is_off_is_accepted(off):
    assert entries_of(unfreeze_ttt_layers=off, yarn=off) == entries_of()


def test_all_that_is_refused_is_named():
    with pytest.raises(ConfigError) as error:
        entries_of(yarn=True, unfreeze_ttt_layers=1)
    assert "yarn = True" in str(error.value)
    assert "unfreeze_ttt_layers = 1" in str(error.value)


# ---- whose it is


def test_a_host_without_earlier_code_refuses_a_mapping():
    config = {"host": {"name": "audio"}, "ttt": {"ttt_mlp_layers": 2}}
    with pytest.raises(ConfigError, match=r"must be a list of entries.*host 'audio' has no earlier form"):
        parse_config(config, registry=default_registry())


def test_without_a_host_only_the_host_is_a_problem():
    with pytest.raises(ConfigError) as error:
        parse_config({"ttt": {"ttt_mlp_layers": 2}}, registry=default_registry())
    assert "config: host: expected a mapping with a 'name'" in str(error.value)
    assert "ttt_mlp_layers" not in str(error.value)
