"""Small Moshis of several kinds on disk, each laid out as a hub repository is: config, weights, codec, tokenizer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import sentencepiece
import torch
from safetensors.torch import save_file

from moshi_ttt.hosts.moshi.tiny import RANDOM_TINY_CONFIG, bundle_folder
from moshi_ttt.hosts.moshi.upstream import loaders

VOICE = [0, 1, 1, 1, 1, 1, 1, 1]
CONFIG: dict[str, Any] = {
    **RANDOM_TINY_CONFIG, "text_card": 512, "card": 128, "num_layers": 4, "context": 32, "model_type": "moshi",
    "moshi_name": "model.safetensors", "mimi_name": "mimi.safetensors", "mimi_config_name": "mimi.json",
    "tokenizer_name": "spm.model",
}  # fmt: skip
_DESCRIPTION = {"type": "lut", "lut": {"n_bins": 4, "dim": 8, "tokenizer": "noop", "possible_values": ["good", "bad"]}}
KINDS: dict[str, dict[str, Any]] = {
    "moshi": {},
    # One voice, that of the model.
    "one voice": {"n_q": 8, "dep_q": 8, "delays": [0, *VOICE]},
    # PersonaPlex: both voices come from the model.
    "both voices": {"n_q": 16, "dep_q": 16, "delays": [0, *VOICE, *VOICE]},
    # Hibiki: a condition is added to every input.
    "sum condition": {
        "conditioners": {"description": _DESCRIPTION}, "fuser": {"sum": ["description"]}, "model_type": "hibiki",
    },
    # Kyutai's text to speech: attends to a speaker's voice.
    "cross-attention": {
        "conditioners": {"description": _DESCRIPTION}, "fuser": {"cross": ["description"]}, "cross_attention": True,
    },
    # Kyutai's speech to text: what is said, as text, half a second late.
    "speech to text": {
        "n_q": 8, "dep_q": 0, "delays": [0] * 9, "model_type": "stt",
        "stt_config": {"audio_delay_seconds": 0.48, "audio_silence_prefix_seconds": 0.0},
    },
}  # fmt: skip
"""What each kind's config.json says beside ``CONFIG``."""


def make_repository(folder: Path, kind: str = "moshi", **changes: Any) -> Path:
    """A model of ``KINDS[kind]`` with random weights, and the tiny Moshi's codec and tokenizer; ``changes`` of its
    config."""
    folder.mkdir(parents=True)
    config = {**CONFIG, **KINDS[kind], **changes}
    (folder / "config.json").write_text(json.dumps(config))
    for own, theirs in (("mimi.safetensors", "tokenizer-tiny-mimi.safetensors"), ("mimi.json", "mimi_config.json"),
                        ("spm.model", "tokenizer_spm_512.model")):  # fmt: skip
        shutil.copy(bundle_folder() / theirs, folder / own)
    options = {key: value for key, value in config.items() if not key.endswith("_name")}
    options = {key: value for key, value in options.items() if key not in ("model_type", "stt_config")}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = loaders.get_moshi_lm(None, json.loads(json.dumps(options)), dtype=torch.float32)
        for parameter in model.parameters():  # random_tiny_lm's scale leaves LayerScale and others at their start
            parameter.data.add_(0.01 * torch.randn_like(parameter))
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, folder / "model.safetensors")
    return folder


def make_tokenizer(path: Path, pieces: int) -> Path:
    """A tokenizer of ``pieces`` pieces, Moshi's padding at its place."""
    words = "to hear a short demonstration press one now the quick brown fox jumps over lazy dogs".split()  # noqa: SIM905
    text = path.with_suffix(".txt")
    text.write_text("\n".join(f"{one} {other} {one}{other}" for one in words for other in words))
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(path.with_suffix("")), vocab_size=pieces, model_type="bpe", pad_id=3,
        minloglevel=2,
    )  # fmt: skip
    return path


def make_codec(folder: Path, *, bins: int = 128, codebooks: int = 8, frame_rate: float = 12.5) -> None:
    """Replace the codec of ``folder`` by one of other sizes, with random weights."""
    config = json.loads((bundle_folder() / "mimi_config.json").read_text())
    config["quantizer"] |= {"bins": bins, "n_q": codebooks}
    config["frame_rate"] = frame_rate
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        mimi = loaders.get_mimi(None, config, num_codebooks=codebooks)
    save_file({name: t.contiguous() for name, t in mimi.state_dict().items()}, folder / "mimi.safetensors")
    (folder / "mimi.json").write_text(json.dumps(config))
