"""Finding and loading a Moshi: from the hub, from a folder laid out like a hub repository, or the tiny one inside."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from moshi_ttt.core.errors import HostError
from moshi_ttt.core.paths import user_path
from moshi_ttt.hosts.moshi import base_weights
from moshi_ttt.hosts.moshi.compatibility import speech_layout
from moshi_ttt.hosts.moshi.compiling import eager_on_cpu
from moshi_ttt.hosts.moshi.initial_values import NoInitialValues
from moshi_ttt.hosts.moshi.stored_lora import LORA_FILE, StoredLoRA, is_lora, with_stored_lora
from moshi_ttt.hosts.moshi.upstream import CheckpointInfo, LMModel, loaders

BUILTIN_TINY = "builtin:tiny"
BUILTIN_7B = "builtin:moshi-7b"
BUNDLE = Path(__file__).parent / "bundle"
FILES = ("moshi_weights", "mimi_weights", "tokenizer", "config_path")
"""The files of a repository that a config can replace by local ones."""
# What a config.json holds beside the options of the language model.
_NOT_OPTIONS = {
    "moshi_name", "mimi_name", "mimi_config_name", "tokenizer_name", "lora_name", "model_type", "lm_gen_config",
    "tts_config", "stt_config", "model_id",
}  # fmt: skip
_LORA_OPTIONS = ("lora", "lora_rank", "lora_scaling", "lora_name")
MERGED_NAME = "consolidated.safetensors"
"""What moshi-finetune, and training here, call the weights of a whole model."""
_STORED_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}


@dataclass(frozen=True)
class MoshiBundle:
    """A language model, a codec and a tokenizer that belong together; nothing is loaded until asked for.

    Attributes:
        name: what the user called it.
        info: Moshi's own description of the files, as of a model without LoRA.
        lora: the LoRA that comes with the model.
    """

    name: str
    info: CheckpointInfo
    lora: StoredLoRA | None = None

    def load_lm(
        self, device: torch.device | str = "cpu", dtype: torch.dtype | None = None, *, lora: bool = True
    ) -> LMModel:
        """The language model in eval mode; ``dtype=None`` is the dtype its weights are stored in.

        A LoRA that comes with it is merged into the weights, or with ``lora=False`` left out. Raises HostError.
        """
        try:
            with NoInitialValues():  # on the meta device, until the weights are there
                model = eager_on_cpu(self.info.get_moshi(device=device, dtype=dtype or self.stored_dtype()))
        except (RuntimeError, OSError, SafetensorError, TypeError, AssertionError, KeyError) as error:
            if is_lora(self.info.moshi_weights):
                raise self._lora_as_weights() from error
            raise self._unloadable(self.info.moshi_weights, error) from error
        if self.lora is not None and lora:
            base_weights.load_base(model, self.base_weights(model))
        return model

    def base_weights(self, model: LMModel, *, lora: bool = True) -> dict[str, Tensor]:
        """The weights of ``model``, the architecture of this bundle on any device, by their present names.

        They are mapped from their file rather than read, but for those that a LoRA changes: it is merged into them, or
        with ``lora=False`` left out. Raises HostError.
        """
        path = self.info.moshi_weights
        if is_lora(path):
            raise self._lora_as_weights()
        try:
            weights = load_file(path)
        except (OSError, SafetensorError) as error:
            raise HostError(f"{self.name}: {path} cannot be read as safetensors: {error}.") from None
        weights = base_weights.present_names(model, weights)
        if self.info.model_type == "hibiki" and "text_emb.weight" in weights:
            # As Moshi loads such a model: the end of the sequence is padding.
            weights["text_emb.weight"] = weights["text_emb.weight"].clone()
            weights["text_emb.weight"][2] = weights["text_emb.weight"][3]
        return with_stored_lora(model, weights, self.lora) if self.lora is not None and lora else weights

    def load_mimi(self, device: torch.device | str = "cpu") -> Any:
        """The codec, a ``MimiModel`` in eval mode, set to the codebooks of one voice of the language model.

        Where it has fewer it is set to all of them, which ``require_compatible`` refuses. Raises HostError.
        """
        model: Mapping[str, Any] = self.info.lm_config or loaders._lm_kwargs
        codec: dict[str, Any] = self.info.mimi_config or loaders._mimi_config
        layout = speech_layout(model["n_q"], model["dep_q"], model.get("delays", [0])[1:])
        try:
            codebooks = min(layout.codebooks, int(codec["quantizer"]["n_q"]))
            return loaders.get_mimi(self.info.mimi_weights, codec, num_codebooks=codebooks, device=device)
        except (RuntimeError, OSError, SafetensorError, TypeError, AssertionError, KeyError) as error:
            raise self._unloadable(self.info.mimi_weights, error) from error

    def tokenizer(self) -> Any:
        """The text tokenizer, a ``SentencePieceProcessor``."""
        try:
            return self.info.get_text_tokenizer()
        except (RuntimeError, OSError) as error:
            raise self._unloadable(self.info.tokenizer, error) from error

    @property
    def text_delay(self) -> float:
        """Seconds by which the model's text follows what is said; 0 but for speech to text."""
        return float(self.info.stt_config.get("audio_delay_seconds", 0.0))

    def stored_dtype(self) -> torch.dtype:
        """The dtype of the stored text embedding; bfloat16 (Moshi's own) where the file does not say."""
        try:
            with safe_open(self.info.moshi_weights, framework="pt") as handle:  # type: ignore[no-untyped-call]
                stored = handle.get_slice("text_emb.weight").get_dtype()
        except (OSError, SafetensorError):
            stored = "BF16"
        return _STORED_DTYPES.get(stored, torch.bfloat16)

    def _lora_as_weights(self) -> HostError:
        return HostError(
            f"{self.info.moshi_weights} holds a LoRA, and not the weights of a model. Give the weights of the base "
            f"model, and the config.json that lies beside the LoRA as config_path: {LORA_FILE} beside it is then used."
        )

    def _unloadable(self, path: Path, error: Exception) -> HostError:
        return HostError(
            f"{self.name}: cannot load {path}: {type(error).__name__}: {error}. "
            "Check that it is the file its config.json describes, and that it is complete."
        )


def resolve_repo(hf_repo: str, *, revision: str | None = None, files: Mapping[str, str] | None = None) -> MoshiBundle:
    """The Moshi that ``hf_repo`` names.

    Args:
        hf_repo: ``builtin:tiny``; or an existing folder with a config.json and the files it names; or a repository
            name on the hub, which is downloaded or taken from the local cache.
        revision: a branch, tag or commit; for the hub only.
        files: local files to use instead of the repository's own, by one of the names in ``FILES``.

    Raises:
        HostError: files are missing (all are named), the config is not a Moshi's, or the hub cannot deliver.
    """
    own = {name: user_path(path) for name, path in (files or {}).items()}
    if missing := [str(path) for path in own.values() if not path.is_file()]:
        raise HostError(f"These files do not exist: {', '.join(missing)}. They were to replace those of {hf_repo}.")
    folder = _local_folder(hf_repo, revision)
    if folder is not None:
        return _bundle(hf_repo, _from_folder(folder, own), own.get("config_path", folder / "config.json"))
    try:
        info = CheckpointInfo.from_hf_repo(hf_repo, revision=revision, **own)
    except (OSError, ValueError) as error:  # what the hub's client raises derives from these two
        raise _hub_failure(hf_repo, revision, error) from error
    return _bundle(hf_repo, info, own.get("config_path"))


def _bundle(name: str, info: CheckpointInfo, config_path: Path | None) -> MoshiBundle:
    """The bundle of ``info``, its LoRA set apart: the one that its config names, or that lies beside ``config_path``.

    moshi-finetune writes ``lora: true`` into the config of a run with LoRA, where it merged the LoRA as well.
    """
    if info.lm_config is None:
        return MoshiBundle(name, info)
    config, path = info.lm_config, info.lora_weights
    if path is None and config_path is not None and (config_path.parent / LORA_FILE).is_file():
        path = config_path.parent / LORA_FILE
    lora = None
    if config.get("lora") and path is not None:
        lora = StoredLoRA(path, int(config.get("lora_rank", 128)), float(config.get("lora_scaling", 2.0)))
    elif config.get("lora") and info.moshi_weights.name != MERGED_NAME:
        raise HostError(
            f"{name}: config.json says that the model has a LoRA, and there is none: no lora_name in it, and no "
            f"{LORA_FILE} beside it. Put the file there; or, if the LoRA is merged into {info.moshi_weights}, set "
            "lora to false."
        )
    elif info.lora_weights is not None:
        raise HostError(f"{name}: config.json names the LoRA {path}, and says lora: false. Change one of them.")
    return MoshiBundle(
        name,
        dataclasses.replace(
            info, lora_weights=None, lm_config=_without_lora(config), raw_config=_without_lora(info.raw_config or {})
        ),
        lora,
    )


def _without_lora(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in _LORA_OPTIONS}


def load_skeleton(
    hf_repo: str, *, revision: str | None = None, dtype: torch.dtype | None = None, config_path: str | None = None
) -> LMModel:
    """The architecture that ``hf_repo`` names, on the meta device: config.json is all that is read, or downloaded.

    ``builtin:moshi-7b`` is the published 7B architecture, for which nothing is read. ``config_path`` is read instead of
    the repository's config.json.
    ``dtype=None`` is the dtype of the weights where they lie beside the config, else bfloat16. Raises HostError.
    """
    if hf_repo == BUILTIN_7B:
        with NoInitialValues():
            return eager_on_cpu(loaders.get_moshi_lm(None, device="meta", dtype=dtype or torch.bfloat16))
    folder = None if config_path else _local_folder(hf_repo, revision)
    if config_path is not None:
        path = user_path(config_path)
        if not path.is_file():
            raise HostError(f"{path} does not exist. It was to replace the config.json of {hf_repo}.")
    elif folder is not None:
        path = folder / "config.json"
    else:
        try:
            path = loaders.hf_get("config.json", hf_repo, revision=revision)
        except (OSError, ValueError) as error:
            raise _hub_failure(hf_repo, revision, error) from error
    config = _read_config(path)
    weights = _weights_in(path.parent, config)
    options = _without_lora({key: value for key, value in config.items() if key not in _NOT_OPTIONS})
    nothing = Path()
    info = CheckpointInfo(weights, nothing, nothing, lm_config=options, model_type=config.get("model_type", "moshi"))
    bundle = MoshiBundle(hf_repo, info)
    try:
        with NoInitialValues():
            return eager_on_cpu(info.get_moshi(device="meta", dtype=dtype or bundle.stored_dtype(), load_weight=False))
    except (RuntimeError, TypeError, AssertionError, KeyError) as error:
        raise bundle._unloadable(path, error) from error


def _local_folder(hf_repo: str, revision: str | None) -> Path | None:
    """The folder that ``hf_repo`` names, or None when it can only be a name on the hub."""
    if hf_repo == BUILTIN_TINY:
        if not (BUNDLE / "config.json").is_file():
            raise HostError(
                f"{BUILTIN_TINY}: this installation has no tiny Moshi in {BUNDLE}. "
                "Build it with scripts/build_tiny_bundle.py, or install a released wheel."
            )
        return BUNDLE
    if hf_repo == BUILTIN_7B:
        raise HostError(
            f"{BUILTIN_7B} is the published architecture without weights, for planning (`moshi-ttt explain`). "
            "To load the model give its repository, kyutai/moshiko-pytorch-bf16, or a folder that holds it."
        )
    if hf_repo.startswith("builtin:"):
        raise HostError(f"There is no {hf_repo!r}: built in are {BUILTIN_TINY!r} and, for planning, {BUILTIN_7B!r}.")
    folder = user_path(hf_repo)
    if folder.is_dir():
        if revision is not None:
            raise HostError(f"{hf_repo} is a local folder, and a folder has no revisions: leave out {revision!r}.")
        return folder
    if hf_repo.startswith((".", "/", "~")) or hf_repo.count("/") != 1:
        raise HostError(
            f"{hf_repo!r} is neither an existing folder nor a repository name of the form 'owner/name'. "
            f"Give a folder with a config.json, a hub repository, or {BUILTIN_TINY!r}."
        )
    return None


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise HostError(f"{path.parent} has no config.json, so it is not a folder with a Moshi.") from None
    except (OSError, ValueError) as error:
        raise HostError(f"{path} cannot be read: {error}.") from None
    if not isinstance(config, dict) or not {"dim", "n_q", "dep_q", "card"} <= config.keys():
        raise HostError(f"{path} does not describe a Moshi: it needs at least dim, n_q, dep_q and card.")
    return config


def _weights_in(folder: Path, config: Mapping[str, Any]) -> Path:
    """The weights beside a config.json: what it names, or those of a whole model that a fine-tuning wrote there."""
    named = folder / str(config.get("moshi_name", loaders.MOSHI_NAME))
    merged = folder / MERGED_NAME
    return merged if merged.is_file() and not named.is_file() else named


def _from_folder(folder: Path, own: Mapping[str, Path]) -> CheckpointInfo:
    config_path = own.get("config_path", folder / "config.json")
    config = _read_config(config_path)
    # Paths, because Moshi would look for plain names on the hub.
    wanted = {
        "moshi_weights": config.get("moshi_name", loaders.MOSHI_NAME),
        "mimi_weights": config.get("mimi_name", loaders.MIMI_NAME),
        "tokenizer": config.get("tokenizer_name", loaders.TEXT_TOKENIZER_NAME),
        "mimi_config_path": config.get("mimi_config_name"),
        "lora_weights": config.get("lora_name"),
    }
    elsewhere = {key: name for key, name in wanted.items() if name and name.startswith(("hf://", "file://"))}
    local = {key: folder / name for key, name in wanted.items() if name and key not in elsewhere}
    if "moshi_weights" in local:
        local["moshi_weights"] = _weights_in(folder, config)
    local |= {key: path for key, path in own.items() if key != "config_path"}
    described = local.get("mimi_config_path")
    if described is not None and not described.is_file() and "mimi_weights" in own:
        local["mimi_config_path"] = own["mimi_weights"].parent / described.name  # it describes those weights
    missing = sorted(path.name for path in local.values() if not path.is_file())
    if missing:
        raise HostError(
            f"{folder} is incomplete: {', '.join(missing)} missing. Its config.json names these files. Put them there, "
            "or give those of another folder: host.moshi_weights, mimi_weights and tokenizer; moshi_paths.moshi_path, "
            "mimi_path and tokenizer_path. For the LoRA of a fine-tuning give its base model, and its config.json as "
            "config_path."
        )
    return CheckpointInfo.from_hf_repo(str(folder), config_path=config_path, **(elsewhere | local))


def _hub_failure(name: str, revision: str | None, error: Exception) -> HostError:
    at = f" at revision {revision!r}" if revision else ""
    return HostError(
        f"Cannot get {name!r}{at} from the Hugging Face hub: {type(error).__name__}: {error}. There is no folder of "
        "that name here either. Check the name, the network and your access, or give the path of a local copy."
    )
