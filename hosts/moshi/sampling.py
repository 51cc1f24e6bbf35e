"""Moshi's generation loop with the noise, temperature and top-k of every row its own.

Moshi draws the noise of all rows at once from the global generator, so a row's tokens depend on how many others there
are. Here each row has a generator on the CPU. What it draws for a frame is copied into buffers that stay where they
are, and a step, which may be a captured graph, reads those. A row draws in the order of Moshi's own loop, so one row
alone samples what Moshi samples with the same seed.

Shape legend: B rows, Q codebooks that the model predicts, K candidates of a token, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from moshi_ttt.core.config import LARGEST_VOLUME
from moshi_ttt.core.errors import HostError
from moshi_ttt.hosts.moshi.upstream import LMGen, LMModel

TOP_K, TEXT_TOP_K = 250, 25
"""Moshi's own: the candidates of an audio token and of a text token."""


@dataclass(frozen=True, kw_only=True)
class SlotSettings:
    """What is one row's own. Raises HostError for values that are not allowed.

    Attributes:
        seed: of the row's generator.
        temperature, text_temperature: of audio and text tokens; 0 takes the likeliest.
        top_k, text_top_k: how many of the likeliest are candidates, 1 or more.
        updates: whether the row's memory learns.
        volume: of what the blocks add for the row, 0 (the base model) to ``LARGEST_VOLUME``.
    """

    seed: int = 0
    temperature: float = 0.8
    text_temperature: float = 0.7
    top_k: int = TOP_K
    text_top_k: int = TEXT_TOP_K
    updates: bool = True
    volume: float = 1.0

    def __post_init__(self) -> None:
        for name in ("temperature", "text_temperature"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise HostError(f"{name} is {value}: give 0 (the likeliest token) or more.")
        for name in ("top_k", "text_top_k"):
            if getattr(self, name) < 1:
                raise HostError(f"{name} is {getattr(self, name)}: give 1 or more candidates.")
        if not 0 <= self.seed < 2**63:
            raise HostError(f"seed is {self.seed}: give a whole number from 0 to 2**63 - 1.")
        if not 0 <= self.volume <= LARGEST_VOLUME:
            raise HostError(f"volume is {self.volume}: give a number from 0 (the base model) to {LARGEST_VOLUME:g}.")


class _Noise:
    """What one kind of token is sampled with: fixed buffers on the device, and their copies on the CPU.

    Attributes:
        noise: ``[B, N, K]`` float32, exponential, for the N tokens of a frame.
        temperature: ``[B]`` float32. top_k: ``[B]`` int64.
    """

    def __init__(self, rows: int, tokens: int, limit: int, device: torch.device) -> None:
        self.drawn = torch.ones(rows, tokens, limit, pin_memory=device.type == "cuda")
        self.noise = torch.ones(rows, tokens, limit, device=device)
        self.temperature = torch.zeros(rows, device=device)
        self.top_k = torch.ones(rows, dtype=torch.int64, device=device)
        self.rank = torch.arange(limit, device=device)
        self.settings = [(0.0, 1)] * rows
        self.limit = limit

    def set_row(self, row: int, temperature: float, top_k: int) -> None:
        self.settings[row] = (temperature, min(top_k, self.limit))
        self.temperature[row].fill_(temperature)
        self.top_k[row].fill_(top_k)

    def draw(self, row: int, token: int, generator: torch.Generator) -> None:
        """Draw the noise of one token, where the row needs any."""
        temperature, top_k = self.settings[row]
        if temperature > 0:
            self.drawn[row, token, :top_k].exponential_(1, generator=generator)

    def upload(self) -> None:
        # Waits for the copy: the next step of the same tick draws into the buffer that it reads.
        self.noise.copy_(self.drawn)

    def sample(self, logits: Tensor, token: int) -> Tensor:
        """``[B]`` int64 of ``logits [B, V]``: the likeliest where the temperature is 0. No value is read on the CPU.

        Exponential noise q gives argmax(p / q), which is a draw from p, as in Moshi's own sampling.
        """
        greedy = logits.argmax(-1)
        # A row at temperature 0 is divided by 1: what it gives is not used.
        divisor = torch.where(self.temperature > 0, self.temperature, 1)[:, None]  # [B] -> [B, 1]
        probabilities, index = torch.softmax(logits / divisor, dim=-1).topk(self.limit, dim=-1)  # [B, K]
        score = torch.where(self.rank < self.top_k[:, None], probabilities / self.noise[:, token], -1)  # [B, K]
        drawn = index.gather(-1, score.argmax(-1, keepdim=True))[:, 0]  # [B, 1] -> [B]
        return torch.where(self.temperature > 0, drawn, greedy)


class SlotGenerator(LMGen):
    """An LMGen whose rows are independent streams. Where Moshi captures a step in a graph, this is captured too.

    Args:
        model: in eval mode, without conditions.
        rows: how many it will stream.
        top_k, text_top_k: the most candidates that a row can ask for. They are Moshi's own by default, and a row that
            asks for just as many samples what Moshi would.
    """

    def __init__(self, model: LMModel, rows: int, *, top_k: int = TOP_K, text_top_k: int = TEXT_TOP_K) -> None:
        super().__init__(
            model,
            use_sampling=False,
            support_out_of_sync=True,
            on_text_logits_hook=self._sample_text,
            on_text_hook=self._replace_text,
        )
        self.text = _Noise(rows, 1, min(text_top_k, model.text_linear.out_features), model.device)
        self.audio = _Noise(rows, model.dep_q, min(top_k, model.card), model.device)
        self._text_token: Tensor | None = None

    def set_row(self, row: int, settings: SlotSettings) -> None:
        """Sample ``row`` as ``settings`` say, from the next step on."""
        self.audio.set_row(row, settings.temperature, settings.top_k)
        self.text.set_row(row, settings.text_temperature, settings.text_top_k)

    def check_settings(self, settings: SlotSettings) -> None:
        """Raise HostError where ``settings`` ask for more candidates than there is noise for."""
        asked = {"top_k": (settings.top_k, self.audio, self.lm_model.card)}
        asked["text_top_k"] = (settings.text_top_k, self.text, self.lm_model.text_linear.out_features)
        for name, (value, kind, vocabulary) in asked.items():
            if value > kind.limit < vocabulary:
                raise HostError(
                    f"{name} is {value}, and these slots were made for up to {kind.limit} candidates. Give at most as "
                    f"many, or make the slots with largest_{name}={value}."
                )

    def draw(self, generators: dict[int, torch.Generator]) -> None:
        """Draw the noise of the next step for the rows that take part in it."""
        for row, generator in generators.items():
            self.text.draw(row, 0, generator)
            for token in range(self.lm_model.dep_q):
                self.audio.draw(row, token, generator)
        self.text.upload()
        self.audio.upload()

    def _sample_text(self, logits: Tensor) -> None:
        self._text_token = self.text.sample(logits[:, 0, 0].float(), 0)  # [B, 1, 1, V] -> [B, V]

    def _replace_text(self, token: Tensor) -> None:
        """Moshi goes on with ``token [B]``, which it took without noise: the sampled one is put in its place."""
        assert self._text_token is not None
        token.copy_(self._text_token)
        self._text_token = None

    def depformer_step(self, text_token: Tensor, transformer_out: Tensor) -> Tensor:
        """The audio tokens of a frame, ``[B, Q]``, of ``text_token [B]`` and ``transformer_out [B, 1, D]``."""
        model, previous = self.lm_model, text_token
        tokens: list[Tensor] = []
        with model.depformer.streaming(text_token.shape[0]):
            for codebook in range(model.dep_q):
                logits = model.forward_depformer(codebook, previous[:, None, None], transformer_out)  # [B, 1, 1, V]
                previous = self.audio.sample(logits[:, 0, 0].float(), codebook)
                tokens.append(previous)
        return torch.stack(tokens, dim=1)
