"""What the study compares, and at what size. Nothing here computes anything."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

FRAME_RATE = 12.5
MODEL: dict[str, Any] = {
    "dim": 128, "num_heads": 4, "num_layers": 4, "n_q": 4, "dep_q": 2, "delays": [0, 0, 1, 0, 1],
    "depformer_dim": 64, "depformer_dim_feedforward": 264, "depformer_num_heads": 2, "depformer_num_layers": 1,
}  # fmt: skip
"""How the study's Moshi differs from the tiny one: two codebooks a speaker, the least that Moshi trains with."""


@dataclass(frozen=True, kw_only=True)
class Scale:
    """The size of a study.

    Attributes:
        context: frames that attention sees.
        clip: frames of a clip that is presented twice; a training segment is two of them.
        batch: segments of a step.
        base_steps: steps of preparing the base model, all of it trained.
        steps: steps of each arm.
        clips: clips of each recording in recall.
        window: frames of a window in loss by position.
        seeds: of everything random: initial values, order of the recordings.
    """

    context: int = 16
    clip: int = 96
    batch: int = 16
    base_steps: int = 400
    steps: int = 400
    clips: int = 2
    window: int = 48
    seeds: tuple[int, ...] = (0, 1, 2)

    @property
    def segment(self) -> int:
        """Frames of a training segment, and of a forward pass of loss by position."""
        return 2 * self.clip

    @property
    def segment_seconds(self) -> float:
        return self.segment / FRAME_RATE


@dataclass(frozen=True, kw_only=True)
class Arm:
    """Something that is trained on the frozen base model, by changes to the run's config.

    Attributes:
        candidates: what is tried on the validation recordings with the first seed, the best being kept.
    """

    name: str
    changes: tuple[str, ...]
    candidates: tuple[tuple[str, ...], ...] = ((),)

    @property
    def folder(self) -> str:
        """Its name as a folder's."""
        return "".join(letter if letter.isalnum() else "-" for letter in self.name.lower())


FULL = Scale()
SMOKE = Scale(
    clip=24, context=8, batch=2, base_steps=2, steps=2, clips=1, window=16, seeds=(0, 1),
)  # fmt: skip
"""Shows that everything runs; its figures mean nothing."""

# All have about 200,000 trained parameters. A block's gates learn faster than the rest.
TTT = ("optim.lr=3e-3", "optim.lr_groups.gates=3e-2")
ARMS = (
    Arm(
        name="LoRA",
        changes=("ttt=[]", "lora.enable=true", "lora.rank=17"),
        candidates=(("optim.lr=1e-3",), ("optim.lr=3e-3",)),
    ),
    Arm(
        name="TTT-Linear",
        changes=TTT,
        candidates=(
            ('ttt=[{variant: ttt_linear, layers: "1,2,3", chunk: 16}]',),
            ('ttt=[{variant: ttt_linear, layers: "1,2,3", chunk: 16, base_lr: 4}]',),
        ),
    ),
    Arm(
        name="TTT-MLP",
        changes=TTT,
        candidates=(('ttt=[{variant: ttt_mlp, layers: "1,3", chunk: 16}]',),),
    ),
    Arm(
        name="TTT multi-layer (3)",
        changes=TTT,
        candidates=(('ttt=[{variant: ttt_multilayer, layers: "1,3", chunk: 16, depth: 3, expansion: 2}]',),),
    ),
    Arm(
        name="in-place TTT",
        changes=("optim.lr=3e-3",),
        candidates=(
            ('ttt=[{variant: gating_mlp, layers: "1,2,3", chunk: 16, lr: 1, train_w_down: true}]',),
            ('ttt=[{variant: gating_mlp, layers: "1,2,3", chunk: 16, lr: 1, decay: 0.05, train_w_down: true}]',),
        ),
    ),
    Arm(
        name="in-place TTT + LoRA",
        changes=("lora.enable=true", "lora.rank=13"),
        candidates=(
            ("optim.lr=3e-3", 'ttt=[{variant: gating_mlp, layers: "1,2,3", chunk: 16, lr: 1}]'),
            ("optim.lr=3e-3", 'ttt=[{variant: gating_mlp, layers: "1,2,3", chunk: 16, lr: 1, decay: 0.05}]'),
        ),
    ),
)


IN_PLACE, LINEAR = ARMS[4], ARMS[1]


def _in_place(name: str, options: str, *changes: str) -> Arm:
    """In-place TTT's first candidate, with one thing changed."""
    entry = f'ttt=[{{variant: gating_mlp, layers: "1,2,3", lr: 1, train_w_down: true, {options}}}]'
    return Arm(name=f"{IN_PLACE.name}, {name}", changes=(*IN_PLACE.changes, entry, *changes))


def _linear(name: str, options: str) -> Arm:
    """TTT-Linear's first candidate, with one thing changed."""
    entry = f'ttt=[{{variant: ttt_linear, layers: "1,2,3", {options}}}]'
    return Arm(name=f"{LINEAR.name}, {name}", changes=(*LINEAR.changes, entry))


REFERENCES = (IN_PLACE, LINEAR)
"""What ablations change; compared with them are their first candidates."""
ABLATIONS = (
    _in_place("no look-ahead", "chunk: 16, padding: causal"),
    _in_place("chunk 32", "chunk: 32"),
    _in_place("chunk 64", "chunk: 64"),
    _in_place("chunk 128", "chunk: 128"),
    _in_place("inner rate rising", "chunk: 16", "inner_lr_warmup=true"),
    _linear("gate per layer", "chunk: 16, gate: {alpha: layer}"),
    _linear("gate fixed", "chunk: 16, gate: {alpha: fixed}"),
    _linear("chunk 64", "chunk: 64"),
)
"""Open questions, with the first seed, on validation recordings."""
