"""Rebuild the tiny Moshi that ships with the package: one command, about 40 minutes on two cores.

    python scripts/build_tiny_bundle.py --work build/tiny --out hosts/moshi/bundle

What it makes is laid out exactly as a hub repository of Moshi is (``config.json``, ``model.safetensors``, a Mimi, a
sentencepiece model), only small, and trained on real recorded speech, so that its losses mean something:

1. fetch   the Asterisk English prompts (Debian packages; one speaker, 25 minutes, CC-BY-SA-3.0), unpack, split
2. text    fit a sentencepiece model of 512 pieces on the transcripts
3. mimi    train a 0.6 M Mimi as an autoencoder, fit its codebooks by k-means, adapt its decoder to them
4. lm      train the base language model on the codes of the training split, in float32, stored in bfloat16

The recordings named in ``EXCERPT`` are held out from steps 3 and 4 and are shipped with the bundle.
Each step leaves its result in ``--work`` and is skipped when that result exists, so an interrupted build goes on.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

os.environ.setdefault("NO_TORCH_COMPILE", "1")

import sentencepiece
import sphn
import torch
from moshi.models import loaders
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

PACKAGES = ("asterisk-core-sounds-en-wav", "asterisk-core-sounds-en")
VOICE = "usr/share/asterisk/sounds/en_US_f_Allison"
TRANSCRIPTS = "usr/share/doc/asterisk-core-sounds-en/core-sounds-en.txt.gz"
COPYRIGHT = "usr/share/doc/asterisk-core-sounds-en-wav/copyright"
# Shipped with the package and held out from the base model's training. The first is the one quickstart streams.
EXCERPT = (
    "demo-instruct",
    "demo-congrats",
    "basic-pbx-ivr-main",
    "demo-echotest",
    "conf-adminmenu",
    "screen-callee-options",
    "demo-abouttotry",
    "vm-options",
)
SAMPLE_RATE = 24_000
FRAME_RATE = 12.5
FRAME = int(SAMPLE_RATE / FRAME_RATE)
TEXT_PAD, TEXT_END_PAD = 3, 0

MIMI_NAME = "tokenizer-tiny-mimi.safetensors"
SPM_NAME = "tokenizer_spm_512.model"
MIMI_CONFIG = {
    "sample_rate": SAMPLE_RATE,
    "channels": 1,
    "frame_rate": FRAME_RATE,
    "seanet": {**loaders._seanet_kwargs, "dimension": 64, "n_filters": 8},
    "quantizer": {
        **loaders._quantizer_kwargs,
        "dimension": 32,
        "n_q": 8,
        "bins": 128,
        "input_dimension": 64,
        "output_dimension": 64,
    },
    "transformer": {
        **loaders._transformer_kwargs,
        "d_model": 64,
        "num_heads": 4,
        "num_layers": 2,
        "dim_feedforward": 256,
        "input_dimension": 64,
        "output_dimensions": [64],
    },
}
# Moshi's own configuration, scaled down. The attention context is short (5.1 s) on purpose: what lies further back
# can only be used by a memory that outlives attention.
LM_CONFIG = {
    **loaders._lm_kwargs,
    "dim": 256,
    "text_card": 512,
    "card": 128,
    "num_heads": 4,
    "num_layers": 4,
    "context": 64,
    "depformer_dim": 96,
    "depformer_dim_feedforward": int(4.125 * 96),
    "depformer_num_heads": 4,
    "depformer_num_layers": 2,
}


def log(message: str) -> None:
    print(time.strftime("%H:%M:%S"), message, flush=True)


# --------------------------------------------------------------------------------------------------------- 1. speech
def fetch(work: Path) -> Path:
    root = work / "debian"
    if not (root / VOICE).exists():
        root.mkdir(parents=True, exist_ok=True)
        subprocess.run(["apt-get", "download", *PACKAGES], cwd=root, check=True)
        for package in sorted(root.glob("*.deb")):
            subprocess.run(["dpkg", "-x", str(package), str(root)], check=True)
    return root


def transcripts(root: Path) -> dict[str, str]:
    lines: dict[str, str] = {}
    with gzip.open(root / TRANSCRIPTS, "rt", encoding="utf-8", errors="replace") as handle:
        for line in handle:
            name, colon, text = line.strip().partition(":")
            if colon and not line.startswith(";") and not text.strip().startswith("["):
                lines[name.strip()] = text.strip()
    return lines


def recordings(root: Path) -> dict[str, torch.Tensor]:
    """name -> waveform [samples], float32, 24 kHz, peak-safe; only prompts that have a transcript."""
    texts = transcripts(root)
    found: dict[str, torch.Tensor] = {}
    for path in sorted((root / VOICE).glob("*.wav")):
        if path.stem in texts:
            data, rate = sphn.read(str(path))
            found[path.stem] = torch.from_numpy(sphn.resample(data, rate, SAMPLE_RATE)[0]).float()
    return found


# ----------------------------------------------------------------------------------------------------------- 2. text
def fit_text(work: Path, root: Path) -> Path:
    model = work / SPM_NAME
    if not model.exists():
        corpus = work / "text.txt"
        corpus.write_text("\n".join(transcripts(root).values()), encoding="utf-8")
        sentencepiece.SentencePieceTrainer.train(
            input=str(corpus), model_prefix=str(model.with_suffix("")), vocab_size=LM_CONFIG["text_card"],
            model_type="bpe", unk_id=TEXT_END_PAD, bos_id=1, eos_id=2, pad_id=TEXT_PAD, hard_vocab_limit=True,
            minloglevel=2,
        )  # fmt: skip
    return model


# ----------------------------------------------------------------------------------------------------------- 3. mimi
def spectral_loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Multi-resolution STFT loss: L1 of magnitudes and of log magnitudes, plus a light waveform term."""
    loss = 0.1 * F.l1_loss(output, target)
    for size in (256, 512, 1024, 2048):
        window = torch.hann_window(size)
        a, b = (
            torch.stft(x.flatten(0, 1), size, size // 4, window=window, return_complex=True).abs() / size**0.5
            for x in (output, target)
        )
        loss = loss + F.l1_loss(a, b) + 0.3 * F.l1_loss(torch.log(a + 1e-3), torch.log(b + 1e-3))
    return loss


def batch_of_audio(waves: list[torch.Tensor], generator: random.Random, batch: int, frames: int) -> torch.Tensor:
    """Random crops of the concatenated training speech, [batch, 1, samples]."""
    stream = torch.cat(waves)
    length = frames * FRAME
    starts = [generator.randrange(stream.numel() - length) for _ in range(batch)]
    return torch.stack([stream[s : s + length] for s in starts])[:, None]


def train_mimi(work: Path, waves: list[torch.Tensor], minutes: float) -> Path:
    final = work / MIMI_NAME
    if final.exists():
        return final
    torch.manual_seed(0)
    mimi = loaders.get_mimi(None, MIMI_CONFIG, num_codebooks=8)
    generator = random.Random(0)

    def decode(latent: torch.Tensor) -> torch.Tensor:
        (latent,) = mimi.decoder_transformer(mimi._to_encoder_framerate(latent))
        return mimi.decoder(latent)

    def fit(parameters: list[torch.nn.Parameter], minutes: float, quantize_latent: bool) -> None:
        optimizer = torch.optim.AdamW(parameters, lr=1e-3, betas=(0.8, 0.99), weight_decay=1e-2)
        start, step = time.time(), 0
        while (spent := (time.time() - start) / (60 * minutes)) < 1:
            optimizer.param_groups[0]["lr"] = 1e-3 * min(1.0, (step + 1) / 50) * (0.5 + 0.5 * math.cos(math.pi * spent))
            audio = batch_of_audio(waves, generator, 4, 20)
            with torch.set_grad_enabled(not quantize_latent):
                latent = mimi.encode_to_latent(audio, quantize=quantize_latent)
            output = decode(latent)[..., : audio.shape[-1]]
            loss = spectral_loss(output, audio)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            if step % 100 == 0:
                log(f"mimi {'decoder' if quantize_latent else 'autoencoder'} step {step} loss {loss.detach():.4f}")
            step += 1

    log("training Mimi as an autoencoder")
    mimi.train()
    fit([p for name, p in mimi.named_parameters() if not name.startswith("quantizer")], minutes * 0.6, False)
    mimi.eval()
    log("fitting the codebooks")
    with torch.no_grad():
        latents = [
            mimi.encode_to_latent(w[None, None], quantize=False) for w in torch.cat(waves).split(60 * SAMPLE_RATE)
        ]
        joined = torch.cat(latents, dim=-1)
        # Project codebooks' inputs by principal directions: the input and output projections are 1x1 convolutions.
        for vq in (mimi.quantizer.rvq_first, mimi.quantizer.rvq_rest):
            flat = joined[0].T - joined[0].mean(1)
            _, _, v = torch.linalg.svd(flat, full_matrices=False)
            basis = v[: vq.input_proj.weight.shape[0]]
            vq.input_proj.weight.copy_(basis[..., None])
            vq.output_proj.weight.copy_(basis.T[..., None])
        mimi.quantizer.train()
        for _ in range(12):  # each pass k-means-initializes one more residual level, then refines by moving average
            mimi.quantizer(joined, FRAME_RATE)
        mimi.quantizer.eval()
        codes = mimi.quantizer.encode(joined)
        log(f"distinct codes per codebook: {[int(c.unique().numel()) for c in codes[0]]}")
    for module in mimi.modules():
        if hasattr(module, "_embedding"):
            module._embedding = None
    log("adapting the decoder to quantized latents")
    tuned = [p for n, p in mimi.named_parameters() if n.startswith(("decoder", "upsample"))]
    mimi.decoder.train()
    fit(tuned, minutes * 0.4, True)
    state = {
        name: value.detach().to(torch.bfloat16 if not name.startswith("quantizer") else value.dtype).contiguous()
        for name, value in mimi.state_dict().items()
    }
    save_file(state, final)
    return final


# ------------------------------------------------------------------------------------------------------------- 4. lm
def variants(wave: torch.Tensor) -> list[torch.Tensor]:
    """The recording as it is, then slower and faster, louder and softer, starting at other points of a frame."""
    made = [wave]
    for speed in (0.88, 0.94, 1.0, 1.06, 1.12):
        stretched = torch.from_numpy(sphn.resample(wave[None].numpy(), int(SAMPLE_RATE * speed), SAMPLE_RATE)[0])
        for lead, gain in ((320, 0.6), (1100, 1.3), (1600, 0.9)):
            made.append(gain * F.pad(stretched, (lead, 0)))
    return made


def encode(work: Path, mimi_path: Path, spm: Path, root: Path, waves: dict[str, torch.Tensor]) -> Path:
    """Codes of every recording: ``name/variant`` [1 + 8, T] int16: text spread evenly over the prompt, then audio."""
    target = work / "codes.safetensors"
    if target.exists():
        return target
    log("encoding all recordings")
    mimi = loaders.get_mimi(mimi_path, MIMI_CONFIG, num_codebooks=8)
    pieces = sentencepiece.SentencePieceProcessor(str(spm))
    texts = transcripts(root)
    codes: dict[str, torch.Tensor] = {}
    with torch.no_grad():
        for name, wave in waves.items():
            for index, version in enumerate(variants(wave)):
                audio = mimi.encode(version[None, None])[0]
                frames = audio.shape[-1]
                text = torch.full((frames,), TEXT_PAD)
                ids = pieces.encode(texts[name])[:frames]
                for place, piece in enumerate(ids):
                    text[place * frames // len(ids)] = piece
                codes[f"{name}/{index}"] = torch.cat([text[None], audio]).to(torch.int16)
        silence = mimi.encode(torch.zeros(1, 1, 40 * FRAME))[0][:, 20:]
        codes["silence"] = silence.to(torch.int16)
    save_file({k: v.contiguous() for k, v in codes.items()}, target)
    return target


def document(names: list[str], codes: dict[str, torch.Tensor], generator: random.Random, frames: int) -> torch.Tensor:
    """[17, frames]: prompts in turn, mostly Moshi's own voice, the other side silent; turns of the user in between."""
    silence = codes["silence"].long()
    parts: list[torch.Tensor] = []
    total = 0
    while total < frames:
        prompt = codes[generator.choice(names)].long()
        length = prompt.shape[-1] + generator.randrange(2, 8)
        quiet = silence.repeat(1, length // silence.shape[1] + 1)[:, :length]
        text = torch.full((1, length), TEXT_PAD)
        moshi, user = quiet.clone(), quiet.clone()
        if generator.random() < 0.7:
            text[0, : prompt.shape[-1]] = prompt[0]
            moshi[:, : prompt.shape[-1]] = prompt[1:]
        else:
            user[:, : prompt.shape[-1]] = prompt[1:]
        parts.append(torch.cat([text, moshi, user]))
        total += length
    whole = torch.cat(parts, dim=1)
    return whole[:, :frames]


def lm_loss(model: torch.nn.Module, codes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean negative log-likelihood (nats) of audio and of text tokens."""
    out = model(codes)
    audio_logits, audio_target = out.logits[out.mask], codes[:, 1 : 1 + model.dep_q][out.mask]
    text_logits, text_target = out.text_logits[out.text_mask], codes[:, :1][out.text_mask]
    weight = torch.where(text_target == TEXT_PAD, 0.5, 1.0)
    text = F.cross_entropy(text_logits.float(), text_target, reduction="none")
    return F.cross_entropy(audio_logits.float(), audio_target), (text * weight).sum() / weight.sum()


def train_lm(work: Path, codes_path: Path, minutes: float) -> Path:
    final = work / "model.safetensors"
    if final.exists():
        return final
    codes = load_file(codes_path)
    prompts = sorted({n.split("/")[0] for n in codes} - {*EXCERPT, "silence"})
    random.Random(0).shuffle(prompts)
    held = [f"{n}/0" for n in prompts[:40]]
    names = [n for n in codes if n.split("/")[0] in prompts[40:]]
    torch.manual_seed(0)
    model = loaders.get_moshi_lm(None, LM_CONFIG, dtype=torch.float32)
    for module in model.modules():  # the loader leaves attention and depformer weights to torch's default: scale down
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.trunc_normal_(module.weight, std=0.7 / module.weight.shape[1] ** 0.5)
    log(f"training the language model: {sum(p.numel() for p in model.parameters()):,} parameters")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
    generator = random.Random(1)
    held_out = torch.stack([document(held, codes, random.Random(7 + i), 250) for i in range(6)])
    start, step = time.time(), 0
    best, best_state = math.inf, {}
    while (spent := (time.time() - start) / (60 * minutes)) < 1:
        model.train()
        optimizer.param_groups[0]["lr"] = (
            8e-4 * min(1.0, (step + 1) / 100) * (0.02 + 0.98 * (0.5 + 0.5 * math.cos(math.pi * spent)))
        )
        batch = torch.stack([document(names, codes, generator, 160) for _ in range(6)])
        # Drop whole codes at random: the corpus is small, this is the cheapest honest regulariser.
        corrupted = torch.where(torch.rand(batch.shape) < 0.2, torch.full_like(batch, -1), batch)
        audio, text = lm_loss(model, corrupted)
        loss = audio + 0.2 * text
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0:
            model.eval()
            with torch.no_grad():
                held_audio, held_text = lm_loss(model, held_out)
            log(
                f"lm step {step} train {audio.detach():.3f}/{text.detach():.3f} "
                f"held-out {held_audio:.3f}/{held_text:.3f} (audio/text nats)"
            )
            if held_audio < best:
                best = float(held_audio)
                best_state = {k: v.detach().to(torch.bfloat16, copy=True) for k, v in model.state_dict().items()}
        step += 1
    log(f"best held-out audio loss {best:.3f} nats (uniform would be {math.log(LM_CONFIG['card']):.3f})")
    save_file(best_state, final, metadata={"held_out_audio_nats": f"{best:.4f}", "steps": str(step)})
    return final


# ---------------------------------------------------------------------------------------------------------- assemble
def assemble(work: Path, out: Path, root: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    for name in ("model.safetensors", MIMI_NAME, SPM_NAME):
        shutil.copy(work / name, out / name)
    config = {
        **LM_CONFIG,
        "model_type": "moshi",
        "moshi_name": "model.safetensors",
        "mimi_name": MIMI_NAME,
        "mimi_config_name": "mimi_config.json",
        "tokenizer_name": SPM_NAME,
    }
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (out / "mimi_config.json").write_text(json.dumps(MIMI_CONFIG, indent=2) + "\n", encoding="utf-8")
    speech = out / "speech"
    speech.mkdir(exist_ok=True)
    texts = transcripts(root)
    for name in EXCERPT:
        shutil.copy(root / VOICE / f"{name}.wav", speech / f"{name}.wav")
    (speech / "transcripts.json").write_text(
        json.dumps({n: texts[n] for n in EXCERPT}, indent=2) + "\n", encoding="utf-8"
    )
    shutil.copy(root / COPYRIGHT, speech / "LICENSE")  # ATTRIBUTION.md beside it is written by hand
    log(f"bundle in {out}: {sum(f.stat().st_size for f in out.rglob('*') if f.is_file()) / 1e6:.1f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for intermediate results")
    parser.add_argument("--out", type=Path, required=True, help="folder to write the bundle to")
    parser.add_argument("--mimi-minutes", type=float, default=14.0)
    parser.add_argument("--lm-minutes", type=float, default=25.0)
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    root = fetch(arguments.work)
    waves = recordings(root)
    missing = [name for name in EXCERPT if name not in waves]
    if missing:
        sys.exit(f"recordings not found in the packages: {missing}")
    training = {n: w for n, w in waves.items() if n not in EXCERPT}
    log(f"{len(waves)} recordings, {sum(w.numel() for w in waves.values()) / SAMPLE_RATE / 60:.1f} min")
    spm = fit_text(arguments.work, root)
    mimi = train_mimi(arguments.work, list(training.values()), arguments.mimi_minutes)
    codes = encode(arguments.work, mimi, spm, root, waves)
    train_lm(arguments.work, codes, arguments.lm_minutes)
    assemble(arguments.work, arguments.out, root)


if __name__ == "__main__":
    main()
