"""What the study compares, and at what size. Nothing here computes anything."""

from __future__ import annotations

from dataclasses import dataclass, replace
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
        shipped: the base model starts from the tiny Moshi that ships (6.2 million parameters, eight codebooks a
            speaker), and not from a smaller one of random weights.
        context: frames that attention sees.
        clip: frames of a clip that is presented twice; a training segment is two of them.
        batch: segments of a step.
        base_steps: steps of preparing the base model, all of it trained.
        steps: steps of each arm.
        clips: clips of each recording in recall.
        buckets: first frames of the four ranges of positions in which speech played once is judged; the last has no
            end.
        least: frames of a bucket that a recording must have to count in it.
        volumes: of what blocks add, on validation recordings.
        between: how many other clips lie between two presentations of a clip.
        held: how many clips are presented before they are presented again.
        hour: frames of one long stream, and of a part of it that is reported.
        seeds: of everything random: initial values, order of the recordings.
    """

    shipped: bool = False
    context: int = 16
    clip: int = 96
    batch: int = 16
    base_steps: int = 300
    steps: int = 400
    clips: int = 2
    buckets: tuple[int, ...] = (48, 192, 480, 960)
    least: int = 48
    volumes: tuple[float, ...] = (0.15, 0.25, 0.35, 0.5, 0.7, 1.0)
    between: tuple[int, ...] = (1, 4, 8, 39, 156, 469)
    held: tuple[int, ...] = (1, 3, 10, 30)
    hour: tuple[int, int] = (45_000, 7_500)
    seeds: tuple[int, ...] = (0, 1, 2)

    @property
    def longer(self) -> bool:
        """Whether the chosen arms are measured for longer too: after other clips, with clips held at once, and over one
        long stream. Not with the model that ships, where this takes most of a day.
        """
        return not self.shipped

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
        kind: of the sites of its blocks, ``sequence`` or ``feed_forward``; None without blocks.
        beside_lora: it has a LoRA as well, and is compared with the LoRA alone.
        on_lora: it is trained on the base model with the LoRA of the arm ``LORA`` merged into it, all of which is
            frozen. Otherwise a LoRA beside blocks is trained together with them.
        judged: False is an open question: it is trained and evaluated on validation recordings with the first seed,
            is not chosen, and is not tested.
    """

    name: str
    changes: tuple[str, ...]
    kind: str | None = None
    beside_lora: bool = False
    on_lora: bool = False
    judged: bool = True

    @property
    def folder(self) -> str:
        """Its name as a folder's."""
        return "".join(letter if letter.isalnum() else "-" for letter in self.name.lower())


FULL = Scale()
SMOKE = Scale(
    clip=24, context=8, batch=2, base_steps=2, steps=2, clips=1, buckets=(8, 16, 24, 32), least=2, volumes=(0.5, 1.0),
    between=(1, 2), held=(1, 2), hour=(96, 48), seeds=(0, 1),
)  # fmt: skip
"""Shows that everything runs; its figures mean nothing."""

LORA = "LoRA"
# A block's gates learn faster than the rest.
RATES = ("optim.lr=3e-3", "optim.lr_groups.gates=3e-2")
SITES = 'layers: "1,2,3", chunk: 16'
CORRECTING = "learned_lr: true, keys: unit, target_norm: true, start: next_frame, read_scale: 8"


def _ridge(name: str, options: str = "", rank: int = 0, *, on_lora: bool = False) -> Arm:
    """A ridge-regression memory after attention in layers 1 to 3, beside a LoRA of ``rank`` where it is above 0."""
    entry = f"ttt=[{{variant: ttt_ridge, {SITES}{options}}}]"
    return _memory(name, entry, "sequence", rank, on_lora)


def _in_place(name: str, options: str, rank: int = 0, *, on_lora: bool = False) -> Arm:
    """In-place TTT in the gated MLPs of layers 1 to 3, beside a LoRA of ``rank`` where it is above 0."""
    entry = f"ttt=[{{variant: gating_mlp, {SITES}, {options}}}]"
    return _memory(name, entry, "feed_forward", rank, on_lora)


def _memory(name: str, entry: str, kind: str, rank: int, on_lora: bool) -> Arm:
    changes = (*RATES, entry, *_lora(rank))
    return Arm(name=name, changes=changes, kind=kind, beside_lora=rank > 0 or on_lora, on_lora=on_lora)


def _lora(rank: int) -> tuple[str, ...]:
    return ("lora.enable=true", f"lora.rank={rank}") if rank else ()


IN_PLACE_RIDGE = f"update: ridge, lr: 1.0, {CORRECTING}, success_gate: true"
IN_PLACE_GRADIENT = f"update: gradient, lr: 0.3, {CORRECTING}, success_gate: true"
WIDE = ", features: relu2, key_width: 256"
ARMS = (
    _ridge("ridge layer"),
    _in_place("in place, ridge", IN_PLACE_RIDGE),
    Arm(name=LORA, changes=("optim.lr=3e-3", "ttt=[]", *_lora(17))),
    _ridge("ridge layer + LoRA", rank=4),
    _in_place("in place, ridge + LoRA", IN_PLACE_RIDGE, rank=13),
    _ridge("ridge layer, wide keys", WIDE),
    _ridge("ridge layer on LoRA", on_lora=True),
    _in_place("in place, published", "lr: 1, train_w_down: true"),
    _in_place("in place, ridge on LoRA", IN_PLACE_RIDGE, on_lora=True),
    replace(_ridge("ridge layer, wide keys, on LoRA", WIDE, on_lora=True), judged=False),
    replace(_ridge("ridge layer, no success gate", ", success_gate: false"), judged=False),
    replace(_in_place("in place, gradient", IN_PLACE_GRADIENT), judged=False),
    Arm(
        name="TTT-MLP",
        changes=(
            *RATES, 'ttt=[{variant: ttt_mlp, layers: "1,3", chunk: 16, conv_kernel: 4, value: embedding, '
            "inner_norm: false, init_std: 0.3, base_lr: 4}]",
        ),
        kind="sequence",
        judged=False,
    ),
)  # fmt: skip
"""In the order in which they are trained: what answers the question comes first. At most 215,000 parameters each."""
OF_SHIPPED = tuple(
    arm for arm in ARMS
    if arm.name in (LORA, "ridge layer, wide keys", "ridge layer on LoRA", "in place, ridge on LoRA")
)  # fmt: skip
"""The arms that are trained on the model that ships: of those that were chosen with the smaller one, the best three."""
