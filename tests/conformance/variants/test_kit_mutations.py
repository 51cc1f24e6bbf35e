"""The kit must fail a block that breaks a rule: each mutation is one real mistake, with the checks that catch it."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import replace
from unittest import mock

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException
from torch.autograd.gradcheck import GradcheckError

from moshi_ttt.core import testing as kit
from moshi_ttt.core.block import BlockContext
from moshi_ttt.core.errors import PrecisionError
from moshi_ttt.core.registry import default_registry
from moshi_ttt.core.state import map_state
from moshi_ttt.core.state_ranges import StateRange, counters
from moshi_ttt.core.testing import BlockCase, Shape, conformance_tests
from moshi_ttt.core.testing.checks_layouts import layouts
from moshi_ttt.plugins.common.projection import Linear
from moshi_ttt.plugins.hybrid import chunk
from moshi_ttt.plugins.ttt_linear.block import TTTLinear
from moshi_ttt.plugins.ttt_linear.config import TTTLinearConfig
from tests.conformance.variants.grid import WITHOUT_STEPS, runs_by_default


class NoCausalMask(TTTLinear):
    """Every query of a chunk uses all keys of the chunk, as in the published video form."""

    def compute(self, x, state, context):
        inner_loop = chunk.written_out_inner_loop
        chunk.written_out_inner_loop = lambda *given, causal, **options: inner_loop(*given, causal=False, **options)
        try:
            return super().compute(x, state, context)
        finally:
            chunk.written_out_inner_loop = inner_loop


class SharedRows(TTTLinear):
    """One fast-weight state for the whole batch."""

    def compute(self, x, state, context):
        y, after = super().compute(x, state, context)
        shared = {n: t.mean(0, keepdim=True).expand_as(t) if n.startswith("weight") else t for n, t in after.items()}
        return y, shared


class RoundedState(TTTLinear):
    """Fast weights pass through bfloat16 between calls."""

    def compute(self, x, state, context):
        y, after = super().compute(x, state, context)
        return y, map_state(lambda t: t.bfloat16().to(t.dtype) if t.is_floating_point() else t, after)


class BfloatState(TTTLinear):
    """Fast weights are kept in bfloat16."""

    def init_state(self, batch_size, device=None):
        state = super().init_state(batch_size, device)
        return map_state(lambda t: t.bfloat16() if t.is_floating_point() else t, state)


class WritesParameter(TTTLinear):
    """The learned initial weights are overwritten by the learned state."""

    def compute(self, x, state, context):
        y, after = super().compute(x, state, context)
        self.fast_weight[0].data.copy_(after["weight.0"][0])
        return y, after


class ForgetsMask(TTTLinear):
    """Streaming ignores the execution mask."""

    def step(self, x, state, context=None):
        return super().step(x, state, BlockContext(input_embeddings=context.input_embeddings))


class ResetsToZero(TTTLinear):
    """A reset goes to zero instead of the learned initial weights."""

    def reset_state(self, state, mask):
        for tensor in state.values():
            tensor[mask] = 0


class ReadsOnHost(TTTLinear):
    """A step branches on a tensor's value."""

    def step(self, x, state, context=None):
        if int(state["position"][0]) >= 0:
            return super().step(x, state, context)
        return x


class KeepsNonfinite(TTTLinear):
    """Tokens that are not finite enter the inner loop like others."""

    def compute(self, x, state, context):
        everything = torch.ones(x.shape[:2], dtype=torch.bool)
        with mock.patch.object(chunk, "only_finite", lambda tokens: (tokens, everything)):
            return super().compute(x, state, context)


class CountsWhatIsDisabled(TTTLinear):
    """An update that is disabled is counted as skipped where a token is not finite."""

    def compute(self, x, state, context):
        y, after = super().compute(x, state, context)
        mask = context.updates_mask(x)
        if mask is not None:
            after["skipped"] = after["skipped"] + (~mask & ~x.flatten(1).isfinite().all(1))
        return y, after


class MixesRows(TTTLinear):
    """Zero times the mean of the batch is added: nothing, until a row is not finite."""

    def compute(self, x, state, context):
        y, after = super().compute(x, state, context)
        return y + 0 * x.mean(0), after


class DropsDetachedState(TTTLinear):
    """A state that is cut from the graph is taken for one that nobody wants."""

    def compute(self, x, state, context):
        y, after = super().compute(x, state, context)
        return y, self.init_state(len(x), x.device) if context.detach_state else after


class CopiesFromTheCPU(TTTLinear):
    """A constant is made on the CPU and copied at every call."""

    def compute(self, x, state, context):
        y, after = super().compute(x, state, context)
        return y + 0 * torch.arange(x.shape[-1]).to(y), after


class PicksRowsByMask(TTTLinear):
    """Rows are picked by a mask, whose number of true values the CPU must know."""

    def reset_state(self, state, mask):
        fresh = self.init_state(len(mask), mask.device)
        for name, tensor in state.items():
            tensor[mask] = fresh[name][mask]


class ReadsInBackward(TTTLinear):
    """The backward pass looks at a gradient's value."""

    def compute(self, x, state, context):
        def doubled_where_small(gradient):
            return gradient if gradient.norm() > 1e-3 else 2 * gradient

        y, after = super().compute(x, state, context)
        if y.requires_grad:
            y.register_hook(doubled_where_small)
        return y, after


class KeepsFakeTensor(TTTLinear):
    """A constant is made at the first call, in whatever mode that is."""

    constant: torch.Tensor | None = None

    def compute(self, x, state, context):
        if self.constant is None:
            self.constant = torch.zeros(x.shape[-1], dtype=x.dtype)
        y, after = super().compute(x, state, context)
        return y + self.constant, after


class KeepsFakeTensorForValues(TTTLinear):
    """A constant of a step is kept where the state has values, though it is made under the mode of fake tensors."""

    constant: torch.Tensor | None = None

    def step(self, x, state, context=None):
        constant = self.constant
        if constant is None:
            constant = torch.zeros(x.shape[-1], dtype=x.dtype)
            if type(next(iter(state.values()))) is torch.Tensor:
                self.constant = constant
        return super().step(x, state, context) + constant


class MeasuresUnderAutocast(TTTLinear):
    """Statistics are computed by products that an autocast rounds."""


MeasuresUnderAutocast.statistics = TTTLinear.statistics.__wrapped__


class KeepsFunction(TTTLinear):
    """A function that was made inside another is kept, which no pickle can hold."""

    def __init__(self, config, info, roles):
        super().__init__(config, info, roles)
        self.identity = lambda y: y


class KeepsCasts(TTTLinear):
    """A projection is cast at the first step, for good."""

    def layer(self, gate=None, context=None):
        made = super().layer(gate, context)
        if not torch.is_grad_enabled():
            if not hasattr(self, "kept"):
                self.kept = Linear(*(part.to(self.roles.matmul) for part in (made.wq.weight, made.wq.bias)))
            made.wq = self.kept
        return made


class ViewsParameter(TTTLinear):
    """A parameter is viewed in another shape, which only a contiguous one allows."""

    def compute(self, x, state, context):
        y, after = super().compute(x, state, context)
        return y + 0 * self.lr_weight.view(-1)[0].to(y), after


class WritesToCopies(TTTLinear):
    """A step takes buffers that are not contiguous, and what it writes to a copy of one with two heads is lost."""


WritesToCopies.step = TTTLinear.step.__wrapped__


class ScalarParameter(TTTLinear):
    """A parameter without a dimension."""

    def __init__(self, config, info, roles):
        super().__init__(config, info, roles)
        self.extra = torch.nn.Parameter(torch.zeros((), device=info.device, dtype=roles.master))


class KeepsLayout(TTTLinear):
    """A call computes on the state as it lies in memory: expanded, or contiguous after a reset."""

    def forward(self, x, state=None, context=None):
        with mock.patch("moshi_ttt.core.state.contiguous", dict):
            return super().forward(x, state, context)


class KeepsAddress(TTTLinear):
    """A call computes on the state from the address it has: aligned, or in the middle of a file."""

    def forward(self, x, state=None, context=None):
        with mock.patch("moshi_ttt.core.state._aligned", lambda tensor: tensor):
            return super().forward(x, state, context)


class ForgetsBuffer(TTTLinear):
    """A persistent buffer gets no value when the block is initialized."""

    def __init__(self, config, info, roles):
        super().__init__(config, info, roles)
        self.register_buffer("steps", torch.zeros(3, dtype=torch.int64, device=info.device))


class NamesNothing(TTTLinear):
    """The names of memory are not those of the state."""

    def memory_names(self):
        return frozenset({"fast_weights"})


class CallsMemoryACache(TTTLinear):
    """Fast weights are left out of memory."""

    def memory_names(self):
        return super().memory_names() - {"weight.0"}


class DeafToTheSchedule(TTTLinear):
    """The factor of the inner learning rate is declared and ignored."""

    def compute(self, x, state, context):
        self.inner_lr_factor = 1.0
        return super().compute(x, state, context)


class UndeclaredSchedule(TTTLinear):
    """The factor of the inner learning rate has an effect and is not declared."""

    scales_inner_lr = False


class ReadsUpdatesOnHost(TTTLinear):
    """Right for each row, by a branch on the switch's value: a captured graph would not follow."""

    def step(self, x, state, context=None):
        if context is not None and isinstance(context.updates, torch.Tensor) and bool(context.updates.all()):
            context = replace(context, updates=True)
        return super().step(x, state, context)


class LearnsInStreams(TTTLinear):
    """Updates that are off are off in a call and on in a stream, from where the output does not show it: a bias."""

    def step(self, x, state, context=None):
        y = super().step(x, state, context)
        state["bias.0"].add_(torch.finfo(state["bias.0"].dtype).eps)
        return y


class IgnoresRowsOfUpdates(TTTLinear):
    """Updates are disabled for all rows where they are for one."""

    def compute(self, x, state, context):
        updates = context.updates
        return super().compute(x, state, replace(context, updates=bool(torch.as_tensor(updates).all())))


class HasNoVolume(TTTLinear):
    """A block of before there was a volume: it declares none."""

    scales_output = False


class IgnoresVolume(TTTLinear):
    """The volume is declared and ignored."""

    def volume_in(self, context):
        return 1.0


class IgnoresOutputScale(TTTLinear):
    """The volume at run time counts, and the option does not."""

    def volume_in(self, context):
        return context.volume


class VolumeOfTheFirstRow(TTTLinear):
    """One volume for the whole batch."""

    def volume_in(self, context):
        volume = super().volume_in(context)
        return volume[:1].expand_as(volume) if isinstance(volume, torch.Tensor) else volume


class ZeroTimesWhatIsAdded(TTTLinear):
    """Right where everything is finite and no zero is negative: 0 times what is not finite is nan."""

    def compute(self, x, state, context):
        volume = self.volume_in(context)
        if not isinstance(volume, torch.Tensor):
            volume = torch.full((len(x),), volume)
        y, blend, after = _blended(self, x, state, context, volume)
        return torch.where(volume[:, None, None] == 1, y, blend), after


class BlendsAtEveryVolume(TTTLinear):
    """x + volume * (y - x): at 1 that is y but for rounding, which no tolerance sees."""

    def compute(self, x, state, context):
        volume = self.volume_in(context)
        if not isinstance(volume, torch.Tensor):
            return super().compute(x, state, context)
        _, blend, after = _blended(self, x, state, context, volume)
        return torch.where(volume[:, None, None] == 0, x, blend), after


def _blended(block, x, state, context, volume):
    """``(y, x + volume * (y - x), state)``, y at volume 1."""
    with mock.patch.object(block, "volume_in", return_value=1.0):
        y, after = TTTLinear.compute(block, x, state, context)
    return y, x + volume.to(x)[:, None, None] * (y - x), after


class LearnsAtItsVolume(TTTLinear):
    """What is not heard is not learned: the volume scales the inner learning rate too."""

    def compute(self, x, state, context):
        volume = context.volume
        kept, self.inner_lr_factor = self.inner_lr_factor, volume if not isinstance(volume, torch.Tensor) else 1.0
        try:
            return super().compute(x, state, context)
        finally:
            self.inner_lr_factor = kept


class StreamsAtVolumeOne(TTTLinear):
    """A call follows the volume and a stream does not."""

    def step(self, x, state, context=None):
        return super().step(x, state, replace(context, volume=1.0))


class RowsOfVolumeInStreams(TTTLinear):
    """A stream at volume 0 in one row leaves the state of that row as it was."""

    def step(self, x, state, context=None):
        if isinstance(context.volume, torch.Tensor):
            context = replace(context, updates=context.volume > 0)
        return super().step(x, state, context)


class ReadsVolumeOnHost(TTTLinear):
    """Right, by a branch on the volume's value: a captured graph would not follow."""

    def step(self, x, state, context=None):
        if context is not None and isinstance(context.volume, torch.Tensor) and bool((context.volume == 1).all()):
            context = replace(context, volume=1.0)
        return super().step(x, state, context)


class FullGradientAtAnyVolume(TTTLinear):
    """Outputs follow the volume; gradients are those of volume 1."""

    def compute(self, x, state, context):
        y, after = super().compute(x, state, context)
        loud, _ = super().compute(x, state, replace(context, volume=1.0))
        return loud + (y - loud).detach(), after


class ForgetsTable(TTTLinear):
    """A buffer that is not persistent has its value from the constructor alone: a build on the meta device loses it."""

    def __init__(self, config, info, roles):
        super().__init__(config, info, roles)
        self.register_buffer("table", torch.arange(3.0, device=info.device), persistent=False)


class ForgetsUnsavedTable(TTTLinear):
    """A buffer that no adapter holds stays without a value when the block is filled from one."""

    def __init__(self, config, info, roles):
        super().__init__(config, info, roles)
        self.register_buffer("table", torch.empty(3, device=info.device), persistent=False)

    def reset_parameters(self, generator=None):
        super().reset_parameters(generator)
        self.table.copy_(torch.arange(3.0))

    def reset_unsaved(self, generator=None):
        pass


class LosesBuffer(TTTLinear):
    """A persistent buffer is neither saved nor loaded."""

    def __init__(self, config, info, roles):
        super().__init__(config, info, roles)
        self.register_buffer("seen", torch.zeros(3, dtype=torch.bool, device=info.device))

    def reset_parameters(self, generator=None):
        super().reset_parameters(generator)
        self.seen.copy_(torch.tensor([True, False, False]))

    def persistent_buffers(self):
        return {}


class DropsTail(TTTLinear):
    """A call that ends inside a chunk forgets the unfinished chunk."""

    def compute(self, x, state, context):
        y, after = super().compute(x, state, context)
        return y, {n: torch.zeros_like(t) if n.startswith(("input", "gradient")) else t for n, t in after.items()}


class DeadParameter(TTTLinear):
    """A parameter that no output depends on."""

    def __init__(self, config, info, roles):
        super().__init__(config, info, roles)
        self.unused = torch.nn.Parameter(torch.zeros(3, device=info.device, dtype=roles.master))


class DetachedGate(TTTLinear):
    """A wrong gradient: the token scale is cut from the graph."""

    def token_scale(self):
        scale = super().token_scale()
        return scale.detach() + 0 * scale


class DifferentiableOnce(TTTLinear):
    """A gradient that is right, and silently wrong when it is differentiated again."""

    def compute(self, x, state, context):
        with mock.patch("moshi_ttt.plugins.hybrid.block.differentiable_again", lambda outputs, *_: tuple(outputs)):
            return super().compute(x, state, context)


class RaisesInOneForm(TTTLinear):
    """torch's own guard against second derivatives: it raises in ``backward``, and ``autograd.grad`` goes around it."""

    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x.square()

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, gradient):
            return 2 * ctx.saved_tensors[0] * gradient

    def compute(self, x, state, context):
        y, after = super().compute(x, state, context)
        return y + self.Square.apply(x), after


class IgnoresOption(TTTLinear):
    """The base learning rate is fixed, whatever the config says."""

    def __init__(self, config, info, roles):
        super().__init__(config.model_copy(update={"base_lr": 1.0}), info, roles)


class RoundsParameters(TTTLinear):
    """``.to(bfloat16)`` rounds the parameters."""

    def _apply(self, fn, recurse=True):
        return torch.nn.Module._apply(self, fn, recurse)


class WrongPlan(TTTLinear):
    """The state's predicted size is not the real one."""

    def state_bytes(self):
        return super().state_bytes() // 2


class GrowingWork(TTTLinear):
    """A stream that does more work the longer it gets."""

    steps = 0

    def step(self, x, state, context=None):
        self.steps += 1
        for _ in range(self.steps // 1_000):
            x = x + 0
        return super().step(x, state, context)


class CountsCalls(TTTLinear):
    """What forward computes depends on how often it was called: recomputation then differs."""

    calls = 0

    def compute(self, x, state, context):
        self.calls += 1
        y, after = super().compute(x, state, context)
        return y * (1 + self.calls), after


class RemembersOnlyTheLastInput(TTTLinear):
    """One forward's data lives in the module, where the next forward overwrites it before its backward."""

    def compute(self, x, state, context):
        if getattr(self, "scale", None) is None:
            self.scale = torch.ones(())
        with torch.no_grad():
            self.scale.fill_(x.abs().mean())
        y, after = super().compute(x, state, context)
        return x + (y - x) * self.scale, after


class ResetWritesWhatBackwardNeeds(TTTLinear):
    """Resetting writes into a tensor that an earlier forward saved."""

    def compute(self, x, state, context):
        self.kept = torch.ones_like(x[:, :1])
        y, after = super().compute(x, state, context)
        return y * self.kept, after

    def reset_state(self, state, mask):
        super().reset_state(state, mask)
        self.kept.mul_(2)


class LosesLearnedBuffer(TTTLinear):
    """Something outputs depend on is not among the parameters, so an adapter does not hold it."""

    def reset_parameters(self, generator=None):
        super().reset_parameters(generator)
        self.factor = float(torch.rand(()))

    def compute(self, x, state, context):
        y, after = super().compute(x, state, context)
        return y * self.factor, after


class LearnsAnyway(TTTLinear):
    """Learns although updates are off."""

    def compute(self, x, state, context):
        return super().compute(x, state, BlockContext())

    def step(self, x, state, context=None):
        return super().step(x, state, BlockContext())


class ReplacesBuffers(TTTLinear):
    """Streaming puts new tensors into the state instead of writing into the buffers."""

    def step(self, x, state, context=None):
        y, after = self(x, state, context)
        state.update(after)
        return y.detach()


class LeavesTraceOfTheFirstToken(TTTLinear):
    """A step leaves in the state what one call over the same tokens does not, while a chunk is young."""

    def step(self, x, state, context=None):
        young = state["position"] == 0
        y = super().step(x, state, context)
        state["gradient.0"][:, :, -1].masked_fill_(young[:, None, None], 1.0)
        state["gradient.0"][:, :, -1].masked_fill_(~young[:, None, None], 0.0)
        return y


class HurriesWithoutState(TTTLinear):
    """Leaves the state it was given alone when nobody wants the next one."""

    def compute(self, x, state, context):
        return super().compute(x, state if context.want_state else None, context)


class ComputesPadding(TTTLinear):
    """Masked tokens are computed like others."""

    def compute_segments(self, x, state, context):
        everything = torch.ones(x.shape[:2], dtype=torch.bool)
        return super().compute_segments(x, state, replace(context, token_mask=everything))


class PaddingTakesAPlace(TTTLinear):
    """Masked tokens are zeros, whose outputs are not used and which count in their chunk."""

    def compute_segments(self, x, state, context):
        mask = context.token_mask[..., None]
        y, after = self.compute(torch.where(mask, x, 0), state, replace(context, token_mask=None, starts=None))
        return torch.where(mask, y, x), after


class MaskOfTheFirstRow(TTTLinear):
    """Every row has the mask of the first."""

    def compute_segments(self, x, state, context):
        return super().compute_segments(
            x, state, replace(context, token_mask=context.token_mask[:1].expand_as(context.token_mask))
        )


class IgnoresStarts(TTTLinear):
    """Documents in a row go on from each other."""

    def compute_segments(self, x, state, context):
        return super().compute_segments(x, state, replace(context, starts=None))


class StartsAtMaskedTokensAreLost(TTTLinear):
    """A start counts only where its token takes part."""

    def compute_segments(self, x, state, context):
        return super().compute_segments(x, state, replace(context, starts=context.starts & context.token_mask))


class PaddingIsZero(TTTLinear):
    """The output of a masked token is zero, not the base model's."""

    def compute_segments(self, x, state, context):
        y, after = super().compute_segments(x, state, context)
        return torch.where(context.token_mask[..., None], y, 0), after


class ForgetsTheUnfinishedChunk(TTTLinear):
    """A start takes the learned weights and leaves the position in the chunk as it was."""

    def reset_state(self, state, mask):
        position = state["position"].clone()
        super().reset_state(state, mask)
        state["position"].copy_(position)


class CutsGraphAtPieces(TTTLinear):
    """Where a call is cut its output is cut from the graph too."""

    def compute_segments(self, x, state, context):
        y, after = super().compute_segments(x, state, context)
        return y.detach() + 0 * sum(parameter.sum() for parameter in self.parameters()) + 0 * x, after


class CutsStreams(TTTLinear):
    """A step's output is cut from the graph, and a gradient that would pass is lost in silence."""


# After the class is made: the base class would guard the method of a class that defines it.
CutsStreams.step = torch.no_grad()(TTTLinear.step)


class DeclaresNoBound(TTTLinear):
    """A position beyond the chunk is let in from a file."""

    def state_ranges(self):
        return counters(self.init_state(1))


class DeclaresTooLittle(TTTLinear):
    """The last position of a chunk is refused."""

    def state_ranges(self):
        return {**super().state_ranges(), "position": StateRange(most=self.config.chunk - 2)}


class ForgetsACounter(TTTLinear):
    def state_ranges(self):
        return {name: allowed for name, allowed in super().state_ranges().items() if name != "skipped"}


class DropsAChannel(TTTLinear):
    """The output is one channel narrower than the input."""

    def compute(self, x, state, context):
        y, after = super().compute(x, state, context)
        return y[..., :-1], after


class RenamesState(TTTLinear):
    """A call names an entry of the state otherwise than ``init_state``."""

    def compute(self, x, state, context):
        y, after = super().compute(x, state, context)
        return y, {"place" if name == "position" else name: tensor for name, tensor in after.items()}


class GrowsState(TTTLinear):
    """A call returns a state of another shape than ``init_state``."""

    def compute(self, x, state, context):
        y, after = super().compute(x, state, context)
        return y, {**after, "weight.0": after["weight.0"][..., None]}


class WritesGivenState(TTTLinear):
    """A call writes its fast weights into the state that it was given."""

    def compute(self, x, state, context):
        y, after = super().compute(x, state, context)
        if state is not None:
            state["weight.0"].copy_(after["weight.0"])
        return y, after


MUTATIONS: dict[type[TTTLinear], set[Callable[[BlockCase], None]]] = {
    DropsAChannel: {kit.check_form},
    RenamesState: {kit.check_form},
    GrowsState: {kit.check_form},
    WritesGivenState: {kit.check_form},
    NoCausalMask: {kit.check_causality, kit.check_splits},
    SharedRows: {kit.check_rows},
    RoundedState: {kit.check_state_is_float32},
    BfloatState: {kit.check_state_is_float32},
    WritesParameter: {kit.check_parameters_unwritten},
    ForgetsMask: {kit.check_exec_mask, kit.check_token_mask_streamed},
    ResetsToZero: {kit.check_reset},
    ReadsOnHost: {kit.check_no_host_read, kit.check_device},
    NamesNothing: {kit.check_memory},
    DeclaresNoBound: {kit.check_state_ranges},
    DeclaresTooLittle: {kit.check_state_ranges},
    ForgetsACounter: {kit.check_state_ranges},
    CallsMemoryACache: {kit.check_memory},
    DeafToTheSchedule: {kit.check_inner_lr_factor},
    UndeclaredSchedule: {kit.check_inner_lr_factor},
    ReadsUpdatesOnHost: {kit.check_no_host_read, kit.check_device},
    LearnsInStreams: {kit.check_updates_off},
    IgnoresRowsOfUpdates: {kit.check_updates_off},
    HasNoVolume: {kit.check_volume},
    IgnoresVolume: {kit.check_volume, kit.check_volume_streamed, kit.check_volume_gradient, kit.check_config_keys},
    IgnoresOutputScale: {kit.check_volume},
    VolumeOfTheFirstRow: {kit.check_volume, kit.check_volume_streamed},
    ZeroTimesWhatIsAdded: {kit.check_volume},
    BlendsAtEveryVolume: {kit.check_volume},
    LearnsAtItsVolume: {kit.check_volume},
    StreamsAtVolumeOne: {kit.check_volume_streamed},
    RowsOfVolumeInStreams: {kit.check_volume_streamed},
    FullGradientAtAnyVolume: {kit.check_volume_gradient},
    ReadsVolumeOnHost: {kit.check_no_host_read, kit.check_device},
    ForgetsBuffer: {kit.check_buffers},
    ForgetsTable: {kit.check_buffers},
    ForgetsUnsavedTable: {kit.check_buffers},
    LosesBuffer: {kit.check_buffers},
    DropsDetachedState: {kit.check_detached_state},
    CopiesFromTheCPU: {kit.check_device},
    PicksRowsByMask: {kit.check_device},
    ReadsInBackward: {kit.check_device},
    KeepsFakeTensor: {kit.check_other_modes},
    KeepsFakeTensorForValues: {kit.check_other_modes},
    MeasuresUnderAutocast: {kit.check_figures_under_autocast},
    KeepsFunction: {kit.check_copies},
    KeepsCasts: {kit.check_changed_parameters},
    ViewsParameter: {kit.check_parameter_layouts},
    WritesToCopies: {kit.check_buffer_layouts},
    ScalarParameter: {kit.check_parameter_dimensions},
    KeepsNonfinite: {kit.check_nonfinite_recovery},
    CountsWhatIsDisabled: {kit.check_nonfinite_recovery},
    MixesRows: {kit.check_nonfinite_rows},
    KeepsLayout: {kit.check_layouts},
    KeepsAddress: {kit.check_layouts},
    DropsTail: {kit.check_splits},
    DeadParameter: {kit.check_trainable_set},
    DetachedGate: {kit.check_gradients_numerically},
    DifferentiableOnce: {kit.check_second_derivatives},
    RaisesInOneForm: {kit.check_second_derivatives},
    IgnoresOption: {kit.check_config_keys},
    RoundsParameters: {kit.check_dtypes},
    WrongPlan: {kit.check_plan_figures},
    LearnsAnyway: {kit.check_updates_off},
    ReplacesBuffers: {kit.check_step_in_place},
    GrowingWork: {kit.check_long_stream},
    LeavesTraceOfTheFirstToken: {kit.check_every_prefix},
    HurriesWithoutState: {kit.check_unwanted_state},
    CountsCalls: {kit.check_checkpointing},
    RemembersOnlyTheLastInput: {kit.check_two_forwards},
    ResetWritesWhatBackwardNeeds: {kit.check_reset_before_backward},
    LosesLearnedBuffer: {kit.check_adapter_round_trip},
    CutsStreams: {kit.check_step_gradient},
    ComputesPadding: {kit.check_token_mask, kit.check_token_mask_gradient},
    PaddingTakesAPlace: {kit.check_token_mask, kit.check_token_mask_streamed, kit.check_token_mask_gradient},
    MaskOfTheFirstRow: {kit.check_token_mask},
    IgnoresStarts: {kit.check_token_mask, kit.check_token_mask_streamed},
    StartsAtMaskedTokensAreLost: {kit.check_token_mask},
    PaddingIsZero: {kit.check_token_mask, kit.check_token_mask_streamed},
    ForgetsTheUnfinishedChunk: {kit.check_token_mask_streamed},
    CutsGraphAtPieces: {kit.check_token_mask_gradient},
}

# What a check raises when it is not an assertion of its own: the tool it leans on speaks first.
RAISED: dict[type[TTTLinear], type[Exception] | tuple[type[Exception], ...]] = {
    BfloatState: PrecisionError,
    ReadsOnHost: (DataDependentOutputException, AssertionError),
    ReadsUpdatesOnHost: (DataDependentOutputException, AssertionError),
    ReadsVolumeOnHost: (DataDependentOutputException, AssertionError),
    DetachedGate: GradcheckError,
    KeepsFakeTensor: DataDependentOutputException,
    KeepsFakeTensorForValues: DataDependentOutputException,
    KeepsFunction: (AttributeError, pickle.PicklingError),
    ViewsParameter: RuntimeError,
    RemembersOnlyTheLastInput: RuntimeError,
    ResetWritesWhatBackwardNeeds: RuntimeError,
}


def _case(block: type[TTTLinear], dtype: torch.dtype) -> BlockCase:
    registry = default_registry().copy()
    registry.register_block("mutant", config=MutantConfig, block=block)
    return BlockCase(variant="mutant", config=MutantConfig(chunk=4), shape=Shape(), dtype=dtype, registry=registry)


class MutantConfig(TTTLinearConfig):
    variant: str = "mutant"


@pytest.mark.exhaustive  # a test of tests
@pytest.mark.parametrize(
    ("mutation", "check"),
    [(mutation, check) for mutation, checks in MUTATIONS.items() for check in sorted(checks, key=lambda c: c.__name__)],
    ids=lambda value: value.__name__,
)
def test_mutation_fails_the_kit(mutation: type[TTTLinear], check: Callable[[BlockCase], None]) -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        if not runs_by_default(check, dtype, first=True):
            continue
        with torch.random.fork_rng():
            try:
                check(_case(mutation, dtype))
            except RAISED.get(mutation, AssertionError):
                return
    pytest.fail(f"{check.__name__} does not notice {mutation.__name__}")


@pytest.mark.exhaustive  # in test_conformance.py the same block passes the same checks
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_the_unmutated_block_passes_every_check_used_here(dtype: torch.dtype) -> None:
    for check in {check for checks in MUTATIONS.values() for check in checks}:
        check(_case(TTTLinear, dtype))


class LaidOut(BlockCase):
    """Every call gets activations and a state that lie in memory in one chosen way."""

    layout = "contiguous"

    def call(self, block, x, state=None, **more):
        state = block.init_state(x.shape[0]) if state is None else state
        return super().call(block, self.lay_out(x), map_state(self.lay_out, state), **more)

    def lay_out(self, tensor):
        return layouts(tensor).get(self.layout, tensor)


@pytest.mark.parametrize("layout", ["expanded", "contiguous", "offset by one element", "transposed"])
def test_mixed_rows_are_caught_in_every_memory_layout(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LaidOut, "layout", layout)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        kit.check_rows(LaidOut(**vars(_case(TTTLinear, dtype))))
        with pytest.raises(AssertionError, match="row 0"):
            kit.check_rows(LaidOut(**vars(_case(SharedRows, dtype))))


@pytest.mark.parametrize("batch", [1, 2])
def test_one_row_and_several_have_one_memory_layout(batch: int) -> None:
    kit.check_layouts(_case(TTTLinear, torch.float32).at(shape=Shape(batch=batch)))


def test_what_is_written_to_a_strided_buffer_with_two_heads_is_lost() -> None:
    case = _case(WritesToCopies, torch.float64)
    block, x = case.block(), case.inputs(case.chunk)
    state = block.allocate_state(len(x))
    strided = {**state, "weight.0": torch.stack([state["weight.0"]] * 2, dim=-1)[..., 0]}
    for token in x.split(1, dim=1):
        case.step(block, token, state)
        case.step(block, token, strided)
    assert not torch.equal(state["weight.0"], strided["weight.0"])


@pytest.mark.parametrize("check", sorted(set(WITHOUT_STEPS) - {kit.check_device}, key=lambda check: check.__name__))
def test_a_check_without_steps_takes_none(monkeypatch, check: Callable[[BlockCase], None]) -> None:
    """``check_device`` takes them on the meta device, where no step is compiled."""

    def taken(*_: object, **__: object) -> None:
        raise AssertionError("a step was taken")

    monkeypatch.setattr(TTTLinear, "step", taken)
    check(_case(TTTLinear, torch.float64))


def test_every_check_has_a_mutation_that_it_catches() -> None:
    assert {check for checks in MUTATIONS.values() for check in checks} == set(kit.CHECKS)


def test_conformance_tests_makes_one_test_per_check_and_case() -> None:
    test = conformance_tests("ttt_linear", {"chunk": 4})
    marks = {mark.args[0]: mark.args[1] for mark in test.pytestmark}
    assert len(marks["check"]) == len(kit.CHECKS)
    assert [case.dtype for case in marks["case"]] == [torch.float64, torch.float32, torch.bfloat16]


def test_unknown_variant_is_refused_with_its_nearest_name() -> None:
    with pytest.raises(ValueError, match="ttt_linear"):
        conformance_tests("ttt_linaer")


def test_check_block_names_the_check_the_case_and_the_rule() -> None:
    """Also where a mistake ends in another error: the cause of a wrong state is found before a stream needs it."""
    for mutation, said in (
        (WritesParameter, "check_parameters_unwritten, mutant-.*'fast_weight.0' was written to.*The rule: Forward,"),
        (RenamesState, "check_form, mutant-.*'place'.*'position'.*The rule: A call gives"),
    ):
        with pytest.raises(AssertionError, match=f"(?s){said}"):
            kit.check_block("mutant", {"chunk": 4}, registry=_case(mutation, torch.float64).registry)


def test_check_block_gives_other_errors_as_the_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise KeyError("mean")

    monkeypatch.setattr(TTTLinear, "compute", broken)
    with pytest.raises(AssertionError, match=r"check_form, .*:\n  KeyError: 'mean'\n  The rule: ") as raised:
        kit.check_block("ttt_linear", {"chunk": 4})
    assert isinstance(raised.value.__cause__, KeyError)
