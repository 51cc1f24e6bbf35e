"""One optimizer step, and an evaluation, on any number of ranks.

The loss of a step is a weighted mean over the global batch: each micro-batch's sum is divided by the weight of all rows
of all ranks, so gradients are the same however the rows are spread (up to the order of additions).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.optim import AdamW
from torch.optim.lr_scheduler import OneCycleLR

from moshi_ttt.configs.training import RunConfig
from moshi_ttt.core.errors import MoshiTTTError
from moshi_ttt.core.host import CarriedState
from moshi_ttt.core.sharding import local, whole
from moshi_ttt.data.dataset import Batch
from moshi_ttt.training.losses import LossWeights, count, loss_sums
from moshi_ttt.training.model import TrainedModel
from moshi_ttt.training.optimizer import advance, current_rates, make_optimizer, make_schedule, prepare_state
from moshi_ttt.training.runtime import Runtime
from moshi_ttt.training.stopping import SafePoints, StepGivenUpError


class TrainingError(MoshiTTTError, RuntimeError):
    """Training that cannot go on."""


@dataclass(frozen=True, kw_only=True)
class Losses:
    """Losses over a set of tokens.

    Attributes:
        text, audio: weighted means, as they are minimised; their sum is the loss.
        text_nats, audio_nats: plain means in nats per token; NaN where there was no such token.
        tokens: how many tokens were predicted.
    """

    text: float
    audio: float
    text_nats: float
    audio_nats: float
    tokens: int

    @property
    def total(self) -> float:
        return self.text + self.audio

    @classmethod
    def of(cls, sums: Tensor, counts: Tensor) -> Losses:
        """From the totals over all ranks of ``losses.SUMS`` and ``losses.COUNTS``."""
        text, audio, text_nats, audio_nats = (float(value) for value in sums)
        text_weight, audio_weight, text_tokens, audio_tokens = (float(value) for value in counts)
        return cls(
            text=text / text_weight if text_weight else 0.0,
            audio=audio / audio_weight if audio_weight else 0.0,
            text_nats=text_nats / text_tokens if text_tokens else math.nan,
            audio_nats=audio_nats / audio_tokens if audio_tokens else math.nan,
            tokens=int(text_tokens + audio_tokens),
        )


@dataclass(frozen=True, kw_only=True)
class Step:
    """What one optimizer step did, the same on every rank.

    Attributes:
        number: from 1.
        gradient_norm: before clipping.
        learning_rates: group -> the rate that this step was made with.
        skipped: the loss or the gradient was not finite, and nothing was changed.
        stop: some rank was asked to stop.
        ready: every rank says that its part of a checkpoint has been written.
        problems: recordings that could not be read on this rank.
        bad_segments: how many there were on all ranks.
    """

    number: int
    losses: Losses
    gradient_norm: float
    learning_rates: Mapping[str, float]
    skipped: bool
    stop: bool
    ready: bool
    problems: tuple[str, ...]
    bad_segments: int


@dataclass
class Trainer:
    """The model, its optimizer, and where training is.

    Attributes:
        step: optimizer steps made (skipped ones included).
        carried: with ``carry_state``, the state of the rows of each micro-batch.
        skipped_in_a_row: steps that were skipped since the last that was not.
    """

    trained: TrainedModel
    run: RunConfig
    runtime: Runtime
    step: int = 0
    skipped_in_a_row: int = 0
    carried: list[CarriedState | None] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.weights = LossWeights(
            first_codebook=self.run.first_codebook_weight_multiplier, text_padding=self.run.text_padding_weight
        )
        self.parameters = list(self.trained.trained().values())
        self.optimizer: AdamW = make_optimizer(self.trained, self.run.optim)
        prepare_state(self.optimizer)
        self.schedule: OneCycleLR = make_schedule(self.optimizer, self.run.optim, self.run.max_steps)
        self.carried = self.carried or [None] * self.run.num_microbatches

    @property
    def rows(self) -> int:
        """Rows of the global batch."""
        return self.run.batch_size * self.run.num_microbatches * self.runtime.world_size

    def make_step(self, batches: Sequence[Batch], *, safe: SafePoints | None = None, ready: bool = False) -> Step:
        """One optimizer step over this rank's micro-batches; every rank calls this.

        Args:
            batches: all of this rank's micro-batches; fewer only where it has been asked to stop while it read them.
            safe: where the step can be left; None: it is made to its end.
            ready: this rank has written its part of the pending checkpoint.

        Raises:
            StepGivenUpError: on every rank, at a safe point; everything is then as it was before the step.
            TrainingError: on every rank, when ``max_bad_steps`` steps in a row had to be skipped.
        """
        random, buffers = _random_state(self.runtime.device), dict(self.trained.injection.named_buffers())
        kept = {
            name: buffer.clone() for name, buffer in buffers.items()
        }  # what a checkpoint has, and forward may change
        try:
            return self._make_step(batches, safe, ready)
        except StepGivenUpError:
            self.trained.injection.set_inner_lr_factor(1.0)
            self.optimizer.zero_grad(set_to_none=True)
            self._reshard()
            _set_random_state(random, self.runtime.device)
            for name, buffer in buffers.items():
                buffer.copy_(kept[name])
            raise

    def _make_step(self, batches: Sequence[Batch], safe: SafePoints | None, ready: bool) -> Step:
        stop = safe is not None and safe.request.asked
        codes = [batch.codes.to(self.runtime.device) for batch in batches]
        problems = tuple(problem for batch in batches for problem in batch.problems)
        counted = [count(self.trained.model, part, self.weights) for part in codes]
        here = torch.stack(counted).sum(0).cpu() if counted else torch.zeros(4, dtype=torch.float64)
        said = torch.tensor([float(ready), float(len(problems)), float(stop)], dtype=torch.float64)
        totals = self.runtime.sum(torch.cat([here, said]))
        counts, (readies, bad, stops) = totals[:4], totals[4:].tolist()
        if stops:  # no step is begun
            raise StepGivenUpError
        self.optimizer.zero_grad(set_to_none=True)
        blocks = self.trained.injection
        blocks.set_inner_lr_factor(self._inner_lr_factor())
        sums, after = self._accumulate(batches, codes, counts, safe)
        blocks.set_inner_lr_factor(1.0)  # what is evaluated or saved has the full rate
        norm = float(whole(nn.utils.clip_grad_norm_(self.parameters, self.run.max_norm)))
        stop = safe is not None and safe.request.asked
        ended = self.runtime.sum(torch.cat([sums.cpu(), torch.tensor([float(stop)], dtype=torch.float64)]))
        losses, stops = Losses.of(ended[:4], counts), float(ended[4])
        skipped = not (math.isfinite(losses.total) and math.isfinite(norm))
        used = current_rates(self.optimizer)
        self.step += 1
        if skipped:
            self._skip(losses, norm)
        else:
            self.skipped_in_a_row = 0
            self.optimizer.step()
            self.carried = after
        if self.step < self.run.max_steps:
            advance(self.schedule, 1)
        return Step(
            number=self.step, losses=losses, gradient_norm=norm, learning_rates=used, skipped=skipped, stop=stops > 0,
            ready=readies == self.runtime.world_size, problems=problems, bad_segments=int(bad),
        )  # fmt: skip

    def _inner_lr_factor(self) -> float:
        """For the step to come: the share of the main learning rate's rise that is behind it."""
        if not self.run.inner_lr_warmup:
            return 1.0
        return min(1.0, (self.step + 1) / max(1.0, self.run.optim.pct_start * self.run.max_steps))

    def _accumulate(
        self, batches: Sequence[Batch], codes: Sequence[Tensor], counts: Tensor, safe: SafePoints | None
    ) -> tuple[Tensor, list[CarriedState | None]]:
        """Backward through every micro-batch; the loss sums here, and the states the rows are in afterwards."""
        model = self.trained.model
        divisors = counts[:2].clamp(min=torch.finfo(torch.float32).tiny).to(self.runtime.device, torch.float32)
        sums = torch.zeros(4, dtype=torch.float64, device=self.runtime.device)
        after: list[CarriedState | None] = []
        for index, (batch, part) in enumerate(zip(batches, codes, strict=True)):
            # Ranks exchange gradients once a step, with the last micro-batch. Until then each holds them whole, which
            # of the whole model would take more memory than everything else.
            exchange = self.run.full_finetuning or index == len(codes) - 1
            self.trained.sharded.set_requires_gradient_sync(exchange)
            if safe is not None and index:
                safe.pass_or_leave()
            with self._carry(self.carried[index], batch) as state:
                found = loss_sums(model, part, self.weights)
                # Sharding averages gradients over ranks, and the divisors already count the rows of all.
                loss = (found[:2] / divisors).sum() * self.runtime.world_size
                if safe is not None:
                    safe.pass_or_leave()
                loss.backward()
            sums += found.detach().double()
            after.append(state)
        return sums, after

    def _carry(self, state: CarriedState | None, batch: Batch) -> AbstractContextManager[CarriedState | None]:
        if not self.run.carry_state:
            return nullcontext(None)
        ids = batch.document_ids.to(self.runtime.device)
        return self.trained.injection.host.carry(self.trained.model, state, document_ids=ids)

    def _skip(self, losses: Losses, norm: float) -> None:
        self.skipped_in_a_row += 1
        if self.skipped_in_a_row < self.run.max_bad_steps:
            return
        broken = [name for name, p in self.trained.trained().items() if _broken(p)]
        gradients = [name for name, p in self.trained.trained().items() if p.grad is not None and _broken(p.grad)]
        raise TrainingError(
            f"Training stopped at step {self.step}: {self.skipped_in_a_row} steps in a row were not finite (loss "
            f"{losses.total}, gradient norm {norm}). Not finite on rank {self.runtime.rank} are parameters: "
            f"{some_of(broken)}; gradients: {some_of(gradients)}. Lower optim.lr or the rate of that group, or the "
            "blocks' base_lr; the last checkpoint is from before."
        )

    @torch.no_grad()
    def without_gradient(self) -> set[str]:
        """Trained parameters that the last step gave no gradient, or one of zeros; every rank calls this."""
        named = self.trained.trained()
        largest = torch.zeros(len(named), device=self.runtime.device)
        for index, parameter in enumerate(named.values()):
            if parameter.grad is not None and (mine := local(parameter.grad)).numel():
                largest[index] = mine.abs().max()
        torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX)
        return {name for name, value in zip(named, largest.tolist(), strict=True) if not value > 0}

    @torch.no_grad()
    def evaluate(
        self, batches: Iterable[Iterable[Batch]], *, safe: SafePoints | None = None
    ) -> tuple[Losses | None, list[str]]:
        """Losses over recordings, each a list of consecutive segments; every rank brings equally many batches.

        With ``carry_state`` memory is carried along a recording. Nothing of the training's state changes. Also what
        could not be read on this rank, which has no loss. No losses when some rank was asked to stop before the end,
        which is seen between segments (``safe``).
        """
        model: Any = self.trained.model
        model.eval()
        sums = torch.zeros(4, dtype=torch.float64, device=self.runtime.device)
        counts = torch.zeros(4, dtype=torch.float64, device=self.runtime.device)
        problems: list[str] = []
        stopped = False
        for recordings in batches:
            state: CarriedState | None = None
            for batch in recordings:
                if safe is not None and (stopped := safe.asked_anywhere()):
                    break
                problems += batch.problems
                codes = batch.codes.to(self.runtime.device)
                counts += count(model, codes, self.weights)
                with self._carry(state, batch) as after:
                    sums += loss_sums(model, codes, self.weights).double()
                state = after
            if stopped:
                break
        model.train()
        self._reshard()
        return None if stopped else Losses.of(self.runtime.sum(sums), self.runtime.sum(counts)), problems

    def _reshard(self) -> None:
        """Put every unit's own part in its place again: the root stays whole after a forward pass without backward."""
        for module in self.trained.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def _random_state(device: torch.device) -> list[Tensor]:
    """Of the generators that a step may draw from: the CPU's, and the device's own."""
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states


def _set_random_state(states: list[Tensor], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)


def _broken(tensor: Tensor) -> bool:
    return not bool(local(tensor).isfinite().all())


def some_of(names: Sequence[str]) -> str:
    """The first few names, and how many more there are."""
    shown = ", ".join(names[:5]) or "none"
    return f"{shown} and {len(names) - 5} more" if len(names) > 5 else shown
