"""Streams through a whole model on the toy host, with its switch for updates, against the definition."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

import torch
from torch import Tensor

from moshi_ttt.core import state as states
from moshi_ttt.core.block import Site, SiteKind
from moshi_ttt.core.host import CarriedState
from moshi_ttt.core.injection import Injection, make_plan
from moshi_ttt.core.precision import FP32_STATE
from moshi_ttt.core.testing import TOY_HOST, ToyModel
from tests.fuzz.cases import HostCall, HostSchedule, NewCarry, Reset, load
from tests.fuzz.comparison import check, error
from tests.fuzz.configurations import memory, updates
from tests.fuzz.definition import HybridStream, InPlaceStream, hidden_activation
from tests.fuzz.schedules import Tokens

BOUND = 1e-10


class ModelRow:
    """The definition of the toy model for one row: x + update, then x + MLP, layer after layer, token by token."""

    def __init__(self, case: HostSchedule, base: Sequence[tuple[Tensor, Tensor]]) -> None:
        self.base = base
        self.streams: dict[Site, HybridStream | InPlaceStream] = {}
        for index, pair in enumerate(case.blocks):
            linear_in, linear_out = base[index]
            for kind, layer in zip(SiteKind, pair, strict=True):
                if layer is not None:
                    values = {**layer.parameters(), "linear_in": linear_in, "linear_out": linear_out}
                    self.streams[Site(index, kind)] = layer.stream(layer.definition(values, keep_graph=False))

    def hear(self, x: Tensor, learns: bool) -> Tensor:
        embedding = x
        for index, (linear_in, linear_out) in enumerate(self.base):
            sequence, feed_forward = (self.streams.get(Site(index, kind)) for kind in SiteKind)
            if sequence is not None:
                x = sequence.hear(x, embedding, learns)
            if feed_forward is not None:
                x = x + feed_forward.hear(x, embedding, learns)
            else:
                x = x + linear_out @ hidden_activation(linear_in, x)
        return x.detach()


def check_host_schedule(case: HostSchedule) -> None:
    """Raises AssertionError at the first call whose outputs are not the definition's, or for the final memory."""
    model = ToyModel(case.width, case.heads, num_layers=len(case.blocks), dtype=torch.float64)
    injection = _injected(case, model)
    base = [(layer.mlp.linear_in.weight.detach(), layer.mlp.linear_out.weight.detach()) for layer in model.layers]
    rows = [ModelRow(case, base) for _ in range(case.batch)]
    tokens = Tokens(case.batch, case.width, torch.float64, case.seed)
    carried = CarriedState()
    with torch.no_grad(), ExitStack() as context:
        carried = context.enter_context(TOY_HOST.carry(model))
        for index, event in enumerate(case.events):
            match event:
                case NewCarry():
                    context.close()
                    carried = context.enter_context(TOY_HOST.carry(model, carried))
                case Reset(anew):
                    for site, state in carried.blocks.items():
                        carried.blocks[site] = states.clone(state)
                        injection.blocks[site].reset_state(carried.blocks[site], torch.tensor(anew))
                    fresh = [ModelRow(case, base) for _ in rows]
                    rows = [new if again else old for again, new, old in zip(anew, fresh, rows, strict=True)]
                case HostCall(length, learns):
                    x, _ = tokens.next(length)
                    with TOY_HOST.updates(model, updates(learns)):
                        y = model(x)
                    on = (learns,) * case.batch if isinstance(learns, bool) else learns
                    expected = torch.stack(
                        [torch.stack([row.hear(token, on[b]) for token in x[b]]) for b, row in enumerate(rows)]
                    )
                    wrong = error(y, expected)
                    check([] if wrong <= BOUND else [f"event {index}: error {wrong:.3g}, above {BOUND:g}"])
    check(_wrong_memory(injection, carried, rows))


def _injected(case: HostSchedule, model: ToyModel) -> Injection:
    placed = [
        (Site(index, kind), layer)
        for index, pair in enumerate(case.blocks)
        for kind, layer in zip(SiteKind, pair, strict=True)
        if layer is not None
    ]
    entries = [layer.config().model_copy(update={"layers": site.layer}) for site, layer in placed]
    injection = make_plan(model, TOY_HOST, entries, policy=FP32_STATE).apply(model)
    for site, layer in placed:
        load(injection.blocks[site], layer.parameters())
    return injection


def _wrong_memory(injection: Injection, carried: CarriedState, rows: Sequence[ModelRow]) -> list[str]:
    problems = []
    for site, state in carried.blocks.items():
        ends = [row.streams[site].memory() for row in rows]
        for name, found in memory(injection.blocks[site], state).items():
            wrong = error(found, torch.stack([end[name] for end in ends]))
            if not wrong <= BOUND:
                problems.append(f"at the end, {name} at {site}: error {wrong:.3g}, above {BOUND:g}")
    return problems
