"""The training loop, for any host: ``fit`` makes steps, a step runs micro-batches forward and backward.

The loss of a step is a weighted mean over the global batch: each micro-batch's sums are divided by the weights of all
rows of all ranks, so gradients are the same however the rows are spread (up to the order of additions).

Everything around the steps (logs, evaluation, checkpoints, health) is a callback. A step can be left at safe points,
where all ranks agree on it; it then has changed nothing.

Shape legend: n losses.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from moshi_ttt.configs.fit import FitConfig
from moshi_ttt.core.batches import Batch
from moshi_ttt.core.host import CarriedState
from moshi_ttt.core.losses import LossMeans, total_loss
from moshi_ttt.core.sharding import whole
from moshi_ttt.training.callback import Callback
from moshi_ttt.training.optimizer import Schedule, advance, current_rates, make_optimizer, make_schedule, prepare_state
from moshi_ttt.training.runtime import Runtime
from moshi_ttt.training.step import Outcome, Step, TrainingError, not_finite, some_of, undone_if_given_up
from moshi_ttt.training.stopping import SafePoints, StepGivenUpError
from moshi_ttt.training.trained import TrainedModel


@dataclass
class Trainer:
    """The model, its optimizer, and the progress of training.

    Attributes:
        trained: the model, sharded over the runtime's mesh where there are several ranks.
        config: batch sizes, optimizer and schedule; what callbacks do has options of its own there.
        runtime: this process among the others (``runtime.start``).
        step: optimizer steps made (skipped ones included).
        carried: with ``carry_state``, the state of the rows of each micro-batch.
        skipped_in_a_row: steps that were skipped since the last that was not.
        safe: where a step can be left; None: every step is made to its end. ``fit`` sets it.
        outcome: how far ``fit`` has come.

    Raises TrainingError: several ranks, and a model that is not sharded over them.
    """

    trained: TrainedModel
    config: FitConfig
    runtime: Runtime
    step: int = 0
    skipped_in_a_row: int = 0
    carried: list[CarriedState | None] = field(default_factory=list)
    safe: SafePoints | None = None
    outcome: Outcome = field(default_factory=lambda: Outcome(step=0))

    def __post_init__(self) -> None:
        if self.runtime.world_size > 1 and not any(self.trained.units()):
            raise TrainingError(
                f"There are {self.runtime.world_size} ranks, and the model is not sharded over them: they would train "
                "apart. Call core.sharding.shard before making the Trainer."
            )
        self.losses = self.trained.losses
        self.parameters = list(self.trained.trained().values())
        self.optimizer: AdamW = make_optimizer(self.trained, self.config.optim)
        prepare_state(self.optimizer)
        self.schedule: Schedule = make_schedule(self.optimizer, self.config.optim, self.config.max_steps)
        self.carried = self.carried or [None] * self.config.num_microbatches

    @property
    def rows(self) -> int:
        """Rows of the global batch."""
        return self.config.batch_size * self.config.num_microbatches * self.runtime.world_size

    # ---- the loop

    def fit(
        self, batches: Iterator[Batch], callbacks: Sequence[Callback] = (), *, safe: SafePoints | None = None
    ) -> Outcome:
        """Train from ``step`` to ``config.max_steps``, or until a rank is asked to stop. Every rank calls this.

        Args:
            batches: this rank's micro-batches, from step ``self.step`` on.
            callbacks: called in this order around every step.
            safe: this rank's requests to stop; None: nothing stops it.

        Raises TrainingError: ``max_bad_steps`` steps in a row were not finite, or a callback cannot continue.
        """
        self.safe, self.outcome.step, self.outcome.stopped = safe, self.step, False
        self.trained.model.train()
        for callback in callbacks:
            callback.begin(self)
        try:
            while self.step < self.config.max_steps and not self.outcome.stopped:
                step = self._next_step(batches, callbacks)
                if step is None:
                    self.outcome.stopped = True
                    break
                self.outcome.step = step.number
                self.outcome.stopped = step.stop and step.number < self.config.max_steps
                for callback in callbacks:
                    callback.after_step(self, step)
        except TrainingError:
            for callback in callbacks:
                callback.give_up(self)
            raise
        for callback in callbacks:
            callback.end(self)
        return self.outcome

    def _next_step(self, batches: Iterator[Batch], callbacks: Sequence[Callback]) -> Step | None:
        """Read this rank's micro-batches and make a step of them; None where all ranks have given it up."""
        began = time.perf_counter()
        if self.safe is not None:
            self.safe.began = time.monotonic()
        mine = self._read(batches)
        ready = all(callback.ready for callback in callbacks)
        try:
            with ExitStack() as stack:
                for callback in callbacks:
                    stack.enter_context(callback.around_step(self, mine))
                step = self.make_step(mine, safe=self.safe, ready=ready)
        except StepGivenUpError:
            return None
        if self.runtime.device.type == "cuda":
            torch.cuda.synchronize()
        step = replace(step, seconds=time.perf_counter() - began)
        if self.safe is not None:
            self.safe.pace.steps.append(step.seconds)
        return step

    def _read(self, batches: Iterator[Batch]) -> list[Batch]:
        """This rank's micro-batches of a step; the rest is not read once the rank has been asked to stop."""
        mine: list[Batch] = []
        while len(mine) < self.config.num_microbatches and not (self.safe is not None and self.safe.request.asked):
            batch = next(batches, None)
            if batch is None:
                raise ValueError(f"The batches ended in step {self.step + 1} of {self.config.max_steps}. Repeat them.")
            mine.append(batch)
        return mine

    # ---- one step

    def make_step(self, batches: Sequence[Batch], *, safe: SafePoints | None = None, ready: bool = False) -> Step:
        """One optimizer step over this rank's micro-batches; every rank calls this.

        Args:
            batches: all of this rank's micro-batches; fewer only where it has been asked to stop while it read them.
            safe: where the step can be left; None: it is made to its end.
            ready: this rank's part of ``Step.ready``.

        Raises:
            StepGivenUpError: on every rank, at a safe point; everything is then as it was before the step.
            TrainingError: on every rank, when ``max_bad_steps`` steps in a row had to be skipped.
        """
        blocks = self.trained.injection
        with undone_if_given_up(dict(blocks.named_buffers()), self.runtime.device):
            try:
                return self._make_step(batches, safe, ready)
            except StepGivenUpError:
                blocks.set_inner_lr_factor(1.0)
                self.optimizer.zero_grad(set_to_none=True)
                self.trained.reshard()
                raise

    def _make_step(self, batches: Sequence[Batch], safe: SafePoints | None, ready: bool) -> Step:
        # 1. What the global batch weighs, and what every rank has to say. One collective.
        stop = safe is not None and safe.request.asked
        inputs = [batch.inputs(self.runtime.device) for batch in batches]
        problems = tuple(problem for batch in batches for problem in batch.problems)
        here = torch.zeros(2, len(self.losses.names), dtype=torch.float64)  # [2, n]
        if inputs:
            here = torch.stack([self.losses.weights(self.trained.model, part) for part in inputs]).sum(0).cpu()
        said = torch.tensor([float(ready), float(len(problems)), float(stop)], dtype=torch.float64)
        totals = self.runtime.sum(torch.cat([here.flatten(), said]))  # [2 n + 3]
        weights, (readies, bad, stops) = totals[:-3].view_as(here), totals[-3:].tolist()
        if stops:  # no step is begun
            raise StepGivenUpError
        # 2. Forward and backward.
        self.optimizer.zero_grad(set_to_none=True)
        self.trained.injection.set_inner_lr_factor(self._inner_lr_factor())
        sums, after = self._accumulate(batches, inputs, weights, safe)
        self.trained.injection.set_inner_lr_factor(1.0)  # evaluations and checkpoints have the full rate
        norm = float(whole(nn.utils.clip_grad_norm_(self.parameters, self.config.max_norm)))
        # 3. The losses of all ranks, and whether one was asked to stop meanwhile. One collective.
        stop = safe is not None and safe.request.asked
        asked = torch.tensor([float(stop)], dtype=torch.float64)
        ended = self.runtime.sum(torch.cat([sums.cpu().flatten(), asked]))  # [2 n + 1]
        losses = LossMeans.of(self.losses, ended[:-1].view_as(here), weights)
        # 4. Change the parameters, unless something is not finite.
        skipped = not (math.isfinite(losses.total) and math.isfinite(norm))
        used = current_rates(self.optimizer)
        self.step += 1
        if skipped:
            self._skip(losses, norm)
        else:
            self.skipped_in_a_row = 0
            self.optimizer.step()
            self.carried = after
        if self.step < self.config.max_steps:
            advance(self.schedule, 1)
        return Step(
            number=self.step, losses=losses, gradient_norm=norm, learning_rates=used, skipped=skipped,
            stop=float(ended[-1]) > 0, ready=readies == self.runtime.world_size, problems=problems,
            bad_segments=int(bad),
        )  # fmt: skip

    def _inner_lr_factor(self) -> float:
        """The progress of the main learning rate's warmup at the next step, from 0 to 1."""
        if not self.config.inner_lr_warmup:
            return 1.0
        return min(1.0, (self.step + 1) / max(1.0, self.config.optim.pct_start * self.config.max_steps))

    def _accumulate(
        self, batches: Sequence[Batch], inputs: Sequence[Any], weights: Tensor, safe: SafePoints | None
    ) -> tuple[Tensor, list[CarriedState | None]]:
        """Backward through every micro-batch; the sums ``[2, n]`` here, and the states the rows are in afterwards."""
        sums = torch.zeros(weights.shape, dtype=torch.float64, device=self.runtime.device)
        after: list[CarriedState | None] = []
        for index, (batch, part) in enumerate(zip(batches, inputs, strict=True)):
            # Ranks exchange gradients once a step, with the last micro-batch. Until then each holds them whole, which
            # of the whole model would take more memory than everything else.
            self.trained.exchange_gradients(not self.config.accumulates_whole or index == len(inputs) - 1)
            if safe is not None and index:
                safe.pass_or_leave()
            with self._carry(self.carried[index], batch) as state:
                found = self.losses.sums(self.trained.model, part)  # [2, n]
                # Sharding averages gradients over ranks, and the weights already count the rows of all.
                loss = total_loss(self.losses, found, weights) * self.runtime.world_size
                if safe is not None:
                    safe.pass_or_leave()
                loss.backward()
            sums += found.detach().double()
            after.append(state)
        return sums, after

    def _carry(self, state: CarriedState | None, batch: Batch) -> AbstractContextManager[CarriedState | None]:
        if not self.config.carry_state:
            return nullcontext(None)
        ids = batch.document_ids.to(self.runtime.device)
        return self.trained.host.carry(self.trained.model, state, document_ids=ids)

    def _skip(self, losses: LossMeans, norm: float) -> None:
        """Count a step that is not finite. Raises TrainingError when there were too many in a row."""
        self.skipped_in_a_row += 1
        if self.skipped_in_a_row < self.config.max_bad_steps:
            return
        named = self.trained.trained()
        gradients = {name: parameter.grad for name, parameter in named.items()}
        raise TrainingError(
            f"Training stopped at step {self.step}: {self.skipped_in_a_row} steps in a row were not finite (loss "
            f"{losses.total}, gradient norm {norm}). Not finite on rank {self.runtime.rank} are parameters: "
            f"{some_of(not_finite(named))}; gradients: {some_of(not_finite(gradients))}. Lower optim.lr or the rate of "
            "that group, or the blocks' base_lr; the last checkpoint is from before."
        )

    # ---- beside the steps

    @torch.no_grad()
    def evaluate(
        self, documents: Iterable[Iterable[Batch]], *, safe: SafePoints | None = None
    ) -> tuple[LossMeans | None, list[str]]:
        """Losses over documents, each a list of consecutive batches; every rank brings equally many batches.

        With ``carry_state`` memory is carried along a document. Nothing of the training's state changes. Also what
        could not be read on this rank, which has no loss. No losses when some rank was asked to stop before the end,
        which is seen between batches (``safe``).
        """
        model, losses, device = self.trained.model, self.losses, self.runtime.device
        model.eval()
        sums, weights = torch.zeros(2, 2, len(losses.names), dtype=torch.float64, device=device)  # [2, n] each
        problems: list[str] = []
        stopped = False
        for document in documents:
            state: CarriedState | None = None
            for batch in document:
                if safe is not None and (stopped := safe.asked_anywhere()):
                    break
                problems += batch.problems
                inputs = batch.inputs(device)
                weights += losses.weights(model, inputs)
                with self._carry(state, batch) as after:
                    sums += losses.sums(model, inputs).double()
                state = after
            if stopped:
                break
        model.train()
        self.trained.reshard()
        return None if stopped else LossMeans.of(losses, self.runtime.sum(sums), self.runtime.sum(weights)), problems
