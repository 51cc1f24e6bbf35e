"""The flat ``ttt:`` block of earlier TTT code for Moshi, read as the list of entries that it stands for.

It is one mapping instead of a list of entries, for one variant, with the names and defaults of that code. Its options
of training, logging and plots are not part of an entry; the message names them, so that nothing is dropped silently.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from moshi_ttt.core.errors import ConfigError, nearest

SHARED = {"enable", "enabled", "layers", "layer_frequency", "start_layer"}
HYBRID = {
    "base_lr", "ttt_base_lr", "mini_batch_size", "initial_gating_alpha", "gating_alpha_init", "ttt_mlp_layers",
    "ttt_mlp_expansion_factor", "ttt_mlp_hidden_dims",
}  # fmt: skip
IN_PLACE = {"chunk_size", "learning_rate", "conv_kernel_size", "delta_clip_fro_norm"}
ELSEWHERE = {
    "persistent_states": "carrying state from segment to segment is host.carry(...), not an entry's option",
    "gradient_checkpointing": "checkpointing is the host's: set it on the model",
    "model_dim": "the width is the host's",
    "num_heads": "the number of heads is the host's",
    "log_inner_loop_losses": "`moshi-ttt train` reads it as inner_losses.enable",
    "inner_loop_log_interval": "`moshi-ttt train` reads it as inner_losses.interval",
    "save_inner_loop_plots": "`moshi-ttt train` reads it as inner_losses.plots",
    "inner_loop_plot_dir": "`moshi-ttt train` reads it as inner_losses.plot_dir",
    "ttt_fig5_enable": "`moshi-ttt train` reads it as inner_losses.enable",
    "librilight_evaluation_mode": "not an entry's option",
}
REFUSED = {
    "unfreeze_ttt_layers": (
        "it trains the down projections themselves. Write `ttt` as a list of entries, and train_w_down: true in "
        "that of gating_mlp"
    ),
    "yarn": (
        "rotary frequencies are scaled nowhere here, and the blocks' positions begin anew in each chunk. Leave it out"
    ),
}
"""What the earlier code can do and this one does not; accepted where it is off."""
KEYS = {*SHARED, *HYBRID, *IN_PLACE, *ELSEWHERE, *REFUSED}
DEFAULT_LAYERS, DEFAULT_BASE_LR, DEFAULT_CHUNK, DEFAULT_ALPHA = "29,30,31", 1.0, 32, 0.05
IN_PLACE_OPTIONS = {"chunk_size": ("chunk", 256), "learning_rate": ("lr", 1e-3), "conv_kernel_size": ("conv_kernel", 2)}
"""Key -> our option, and the default that the earlier code has."""


def native_entries(flat: Mapping[str, Any], where: str) -> tuple[list[dict[str, Any]], str]:
    """The entries that ``flat`` stands for, and a message that shows them and says where the other options are.

    Raises ConfigError with every unknown key, and for options of two variants at once.
    """
    unknown = [f"{where}: ttt: unknown key {key!r}. {nearest(str(key), KEYS)}" for key in flat if key not in KEYS]
    if unknown:
        raise ConfigError("\n".join(unknown))
    asked = [
        f"{where}: ttt: {key} = {flat[key]!r}: {why}." for key, why in REFUSED.items() if not _is_off(flat.get(key))
    ]
    if asked:
        raise ConfigError("\n".join(asked))
    flat = _with_layers(flat, where)
    enabled = _one_of(flat, "enabled", "enable", True, where)
    if not isinstance(enabled, bool):
        raise ConfigError(f"{where}: ttt: enabled = {enabled!r}: give true or false.")
    if flat.keys() & IN_PLACE:
        if both := sorted(flat.keys() & HYBRID):
            raise ConfigError(
                f"{where}: ttt: {', '.join(sorted(flat.keys() & IN_PLACE))} ask for gating_mlp, and {', '.join(both)} "
                "for a layer between attention and the MLP. Write two entries, or leave one group out."
            )
        entries = [_in_place(flat)]
    else:
        entries = [_hybrid(flat, where)]
    entries = entries if enabled else []
    lines = [yaml.safe_dump(entry, default_flow_style=True, sort_keys=False, width=10_000).strip() for entry in entries]
    shown = "\n".join(["ttt:", *(f"  - {line}" for line in lines)]) if lines else "ttt: []"
    notes = "".join(f"\n- {key}: {note}." for key, note in ELSEWHERE.items() if key in flat)
    if "ttt_mlp_expansion_factor" in flat and not any("expansion" in entry for entry in entries):
        notes += "\n- ttt_mlp_expansion_factor: without effect, for no hidden layer's width follows from it."
    return entries, f"{where}: the flat ttt block is read as\n{shown}{notes and f'{chr(10)}Not part of it:{notes}'}"


def _is_off(value: Any) -> bool:
    """Whether an option is off: absent, false, empty, or a section that is not enabled."""
    if isinstance(value, Mapping):
        said = [value[key] for key in ("enable", "enabled") if key in value]
        return not value or (bool(said) and not any(said))
    return not value


def _with_layers(flat: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """``layer_frequency`` F and ``start_layer`` S as the layers they mean, ``every:F@S``."""
    frequency, start = flat.get("layer_frequency"), flat.get("start_layer")
    rest = {key: value for key, value in flat.items() if key not in ("layer_frequency", "start_layer")}
    if frequency is None and start is None:
        return rest
    if rest.get("layers") is not None:
        raise ConfigError(
            f"{where}: ttt: layers says which layers, and so do layer_frequency and start_layer. Leave one out."
        )
    for key, value, least in (("layer_frequency", frequency, 1), ("start_layer", start, 0)):
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < least):
            raise ConfigError(f"{where}: ttt: {key} = {value!r}: give a whole number of {least} or more.")
    return {**rest, "layers": f"every:{1 if frequency is None else frequency}@{0 if start is None else start}"}


def _hybrid(flat: Mapping[str, Any], where: str) -> dict[str, Any]:
    depth, hidden = flat.get("ttt_mlp_layers", 2), flat.get("ttt_mlp_hidden_dims")
    if not isinstance(depth, int) or isinstance(depth, bool) or depth < 1:
        raise ConfigError(f"{where}: ttt: ttt_mlp_layers = {depth!r}: give the number of layers, 1 or more.")
    entry: dict[str, Any] = {"variant": {1: "ttt_linear", 2: "ttt_mlp"}.get(depth, "ttt_multilayer")}
    if hidden is not None:
        if not isinstance(hidden, list | tuple) or ("ttt_mlp_layers" in flat and len(hidden) != depth - 1):
            raise ConfigError(
                f"{where}: ttt: ttt_mlp_hidden_dims = {hidden!r}: give one width for each hidden layer, one less than "
                f"ttt_mlp_layers ({depth})."
            )
        entry = {"variant": "ttt_multilayer", "hidden_dims": list(hidden)}
    entry["layers"] = flat.get("layers", DEFAULT_LAYERS)
    entry["chunk"] = flat.get("mini_batch_size", DEFAULT_CHUNK)
    entry["base_lr"] = _one_of(flat, "base_lr", "ttt_base_lr", DEFAULT_BASE_LR, where)
    entry["gate"] = {"init": _one_of(flat, "initial_gating_alpha", "gating_alpha_init", DEFAULT_ALPHA, where)}
    factor = flat.get("ttt_mlp_expansion_factor")
    if factor is not None and hidden is None and depth > 1:
        if isinstance(factor, float) and factor.is_integer():
            factor = int(factor)
        entry["expansion"] = factor
    if entry["variant"] == "ttt_multilayer" and hidden is None:
        entry["depth"] = depth
    return entry


def _in_place(flat: Mapping[str, Any]) -> dict[str, Any]:
    entry = {"variant": "gating_mlp", "layers": flat.get("layers", DEFAULT_LAYERS)}
    entry |= {name: flat.get(key, default) for key, (name, default) in IN_PLACE_OPTIONS.items()}
    if flat.get("delta_clip_fro_norm") is not None:
        entry["clip"] = flat["delta_clip_fro_norm"]
    return entry


def _one_of(flat: Mapping[str, Any], first: str, second: str, default: Any, where: str) -> Any:
    """The value of two names for one option."""
    given = [flat[key] for key in (first, second) if key in flat]
    if len(given) == 2 and given[0] != given[1]:
        raise ConfigError(f"{where}: ttt: {first} and {second} are one option, and say {given[0]!r} and {given[1]!r}.")
    return given[0] if given else default
