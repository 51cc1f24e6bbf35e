"""The models under test: the base model alone and with each adapter; and the conditions of an evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from moshi_ttt.core.adapter import find_adapter, read_manifest
from moshi_ttt.core.errors import ConfigError
from moshi_ttt.core.host import CarriedState
from moshi_ttt.core.injection import Injection
from moshi_ttt.core.registry import Registry
from moshi_ttt.evaluation.adapters import HeldAdapter
from moshi_ttt.evaluation.teacher_forcing import FrameLosses, segment_losses, stream_losses
from moshi_ttt.hosts.moshi.host import MOSHI_HOST, MoshiHostConfig
from moshi_ttt.hosts.moshi.layers import BlockSite

Condition = Literal["updates on", "updates off", "memory reset", "memory of another"]
CONDITIONS: tuple[Condition, ...] = get_args(Condition)
INTERVENTIONS: tuple[Condition, ...] = ("memory reset", "memory of another")


@dataclass(frozen=True, kw_only=True)
class ModelUnderTest:
    """A model to evaluate.

    Attributes:
        name: what the user calls it.
        model: the language model, in eval mode.
        injection: its blocks; None for the base model, and for an adapter without any.
        facts: where it comes from: adapter folder, training step, parameters.
        held: its adapter, where several models under test share ``model``; None where ``model`` is its own.
    """

    name: str
    model: Any
    injection: Injection | None
    facts: dict[str, Any]
    held: HeldAdapter | None = None

    @property
    def conditions(self) -> tuple[Condition, ...]:
        """The conditions that apply to it: without blocks there is no memory to change."""
        return CONDITIONS if self.injection is not None else CONDITIONS[:1]

    @property
    def context(self) -> int:
        """Frames that attention sees; 0 where it sees everything."""
        return int(self.model.context or 0)

    @property
    def padding(self) -> int:
        """The code that is never predicted: it fills up the shorter recordings of a batch."""
        return int(self.model.zero_token_id)

    def present(self) -> AbstractContextManager[None]:
        """Put the adapter into ``model`` for this context. Contexts of one model under test nest."""
        return nullcontext() if self.held is None else self.held.inserted()


def load_models(
    host: MoshiHostConfig,
    adapters: list[tuple[str, Path]],
    registry: Registry | None = None,
    device: torch.device | str = "cpu",
) -> list[ModelUnderTest]:
    """The base model, and one for each (name, folder): an adapter, or a checkpoint that holds one.

    They share one base model, which is loaded once, and each adapter is in it while it is evaluated. An adapter with a
    LoRA continues the one that the base model comes with: where there is one, such adapters share a second base model,
    without it.

    Raises ConfigError for a name twice, AdapterError for a folder without an adapter or one of another base model.
    """
    names = ["base", *(name for name, _ in adapters)]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"Adapters need names of their own; twice given: {', '.join(twice)}. Write NAME=FOLDER.")
    manifests = {given: read_manifest(find_adapter(given)) for _, given in adapters}  # before weights are read
    base = MOSHI_HOST.load(host, device=device)
    models = [ModelUnderTest(name="base", model=base, injection=None, facts={"parameters": 0})]
    bare = None  # without the LoRA that the base model comes with
    for name, given in adapters:
        folder, model = find_adapter(given), base
        if manifests[given]["extra"] and host.bundle().lora is not None:
            model = bare = bare or MOSHI_HOST.load_for_adapter(host, folder, device=device)
        held = HeldAdapter.load(model, folder, registry)
        facts = {
            "adapter": str(folder), "training_step": manifests[given]["training_step"], "parameters": held.parameters,
        }  # fmt: skip
        injection = held.injection if held.injection.plan.blocks else None
        models.append(ModelUnderTest(name=name, model=model, injection=injection, facts=facts, held=held))
    return models


def evaluate_codes(
    tested: ModelUnderTest,
    codes: Tensor,
    condition: Condition,
    *,
    every: int,
    segments: int | None = None,
    volume: float = 1.0,
) -> FrameLosses:
    """The losses of ``codes [B, Q, T]`` under a condition; the model is afterwards as it was.

    ``memory reset`` puts the fast weights back to their start every ``every`` frames, ``memory of another`` hands each
    row's memory to the next row as often (B must be 2 or more). Attention is left alone by both.

    Args:
        segments: None streams token by token; else the frames of the plain forward passes that are made instead, with
            memory carried from one to the next and attention starting afresh in each.
        volume: of what its blocks add.

    Raises ConfigError: one row has no other's memory, or an intervention would fall inside a segment.
    """
    refuse_uneven((condition,), every=every, segments=segments)
    if condition == "memory of another" and codes.shape[0] < 2:
        raise ConfigError("Memory can be exchanged between two recordings or more: give more, or a larger batch.")
    updates = condition != "updates off"
    with tested.present(), MOSHI_HOST.updates(tested.model, updates), MOSHI_HOST.volume(tested.model, volume):
        if segments is None:
            return _streamed(tested, codes, condition, every)
        return _in_segments(tested, codes, condition, every, segments)


def refuse_uneven(conditions: Sequence[Condition], *, every: int, segments: int | None) -> None:
    """Raise ConfigError where a condition would act inside a segment: a forward pass cannot be interrupted."""
    acting = [condition for condition in conditions if condition in INTERVENTIONS]
    if segments is not None and acting and every % segments:
        below = every // segments * segments
        raise ConfigError(
            f"{' and '.join(acting).capitalize()} every {every} frames would act inside a segment of {segments}, which "
            f"is one forward pass. Give --every as a multiple of --segments, such as "
            f"{f'{below} or ' if below else ''}{below + segments}, or leave it out."
        )


def _streamed(tested: ModelUnderTest, codes: Tensor, condition: Condition, every: int) -> FrameLosses:
    sites = [module for module in tested.model.modules() if isinstance(module, BlockSite)]

    def before(frame: int) -> None:
        if condition not in INTERVENTIONS or not frame or frame % every:
            return
        for site in sites:
            state = site._streaming_state
            assert state is not None
            if condition == "memory reset":
                state.forget()
            else:
                state.exchange()

    return stream_losses(tested.model, codes, before=before)


def _in_segments(tested: ModelUnderTest, codes: Tensor, condition: Condition, every: int, frames: int) -> FrameLosses:
    def between(frame: int, state: CarriedState) -> CarriedState | None:
        if condition not in INTERVENTIONS or frame % every:
            return state
        assert tested.injection is not None
        return _changed(tested.injection, state, condition)

    return segment_losses(tested.model, codes, MOSHI_HOST, frames=frames, between=between)


@torch.no_grad()
def _changed(injection: Injection, state: CarriedState, condition: Condition) -> CarriedState:
    """A carried state with its memory reset, or handed to the next row; what is not memory stays."""
    found = {}
    for site, carried in state.blocks.items():
        block = injection.blocks[site]
        if condition == "memory reset":
            found[site] = block.forget(carried)
        else:
            names = block.memory_names()
            found[site] = {name: t.roll(1, 0) if name in names else t for name, t in carried.items()}
    return CarriedState(found, state.document_ids)
