"""Sections about Moshi's own loop: with and without graphs, restored, and bit-equal to the base at step 0."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from moshi.utils.compile import no_cuda_graph
from torch import Tensor

from moshi_ttt.core.injection import Injection
from moshi_ttt.hosts.moshi.host import MOSHI_HOST
from moshi_ttt.hosts.moshi.streaming import restore_stream_state, stream_state
from moshi_ttt.hosts.moshi.upstream import LMGen

from .cases import VARIANTS, tiny_model
from .report import Report, error

STEPS, LATER = 29, 11


def with_and_without_graphs(report: Report) -> None:
    """LMGen, which captures its step, against the same without graphs: tokens, memory; saved, restored, rows reset."""
    for name, entry in VARIANTS.items():
        if report.out_of_time(f"{name} and what follows"):
            return
        for dtype in (torch.float32,) if report.small else (torch.float32, torch.bfloat16):
            model, injection = tiny_model(entry, report.device, dtype)
            assert injection is not None
            spoken = torch.randint(0, 30, (3, 8, STEPS + LATER), generator=torch.Generator().manual_seed(1))
            spoken = spoken.to(report.device)
            captured = _generate(model, spoken, graphs=True)
            plain = _generate(model, spoken, graphs=False)
            label = f"{name} {str(dtype)[6:]}"
            different = float((captured[0] != plain[0]).sum() + (captured[1] != plain[1]).sum())
            report.check(f"{label}: tokens with and without graphs", different, 0.0)
            memory = [key for key in captured[2] if "buffers" in key]
            worst = max(error(captured[2][key], plain[2][key]) for key in memory)
            report.check(f"{label}: memory with and without graphs", worst, 0.0, "bit for bit")
            report.check(f"{label}: memory that never moved", float(not any(captured[2][k].any() for k in memory)), 0.0)
            resumed = _resume(model, spoken, captured[2])
            report.check(f"{label}: restored after a capture", float((resumed != captured[1]).sum()), 0.0)
            with MOSHI_HOST.frozen(model):
                frozen = _generate(model, spoken, graphs=True)
            different = float(sum((one != other).sum() for one, other in zip(frozen[:2], captured[:2], strict=True)))
            report.check(f"{label}: tokens where parameters are frozen", different, 0.0)
            changed = [_changed(model, injection, spoken, graphs=graphs) for graphs in (True, False)]
            different = float((changed[0] != changed[1]).sum())
            report.check(f"{label}: tokens after a change that a graph cannot see", different, 0.0)


def _changed(model: Any, injection: Injection, spoken: Tensor, *, graphs: bool) -> Tensor:
    """The tokens of a stream in whose middle every parameter is written to; the model is put back."""
    before = [parameter.detach().clone() for parameter in injection.parameters()]

    def change() -> None:
        for parameter in injection.parameters():
            parameter.data.mul_(1.5)

    tokens = _generate(model, spoken, graphs=graphs, at_ten=change)
    with torch.no_grad():
        for parameter, value in zip(injection.parameters(), before, strict=True):
            parameter.copy_(value)
    return torch.cat(tokens[:2], -1)


def _generate(
    model: Any, spoken: Tensor, *, graphs: bool, at_ten: Callable[[], None] = lambda: None
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Tokens of the first steps, of those after saving, and the state between them. ``spoken [B, Q, T]``."""
    generator = LMGen(model, use_sampling=False, support_out_of_sync=True)
    first = []
    with torch.no_grad(), nullcontext() if graphs else no_cuda_graph(), generator.streaming(spoken.shape[0]):
        for t in range(STEPS):
            first.append(generator.step(spoken[..., t : t + 1]).clone())
            if t == 10:
                at_ten()
                generator.reset_streaming(torch.tensor([True, False, False]))
            generator.set_exec_mask(torch.tensor([True, True, t % 4 != 2]))
        saved = {name: tensor.cpu() for name, tensor in stream_state(generator).items()}
        after = [generator.step(spoken[..., t : t + 1]).clone() for t in range(STEPS, STEPS + LATER)]
    return torch.cat(first, -1), torch.cat(after, -1), saved


def _resume(model: Any, spoken: Tensor, saved: dict[str, Tensor]) -> Tensor:
    """The later tokens of another stream, whose graph was captured before the saved state came."""
    generator = LMGen(model, use_sampling=False, support_out_of_sync=True)
    with torch.no_grad(), generator.streaming(spoken.shape[0]):
        for t in range(3):
            generator.step(spoken[..., t : t + 1])
        restore_stream_state(generator, saved)
        later = [generator.step(spoken[..., t : t + 1]).clone() for t in range(STEPS, STEPS + LATER)]
    return torch.cat(later, -1)


def step_zero(report: Report) -> None:
    """A new gating_mlp, and a hybrid block with gate 0, against the base model: training, evaluation, streaming."""
    cases = {"gating_mlp": VARIANTS["gating_mlp"], "ttt_mlp, gate 0": {**VARIANTS["ttt_mlp"], "gate": {"init": 0.0}}}
    codes = torch.randint(0, 30, (2, 17, 20), generator=torch.Generator().manual_seed(1)).to(report.device)
    for dtype in (torch.float32, torch.bfloat16):
        base = _logits(tiny_model(None, report.device, dtype)[0], codes)
        for name, entry in cases.items():
            found = _logits(tiny_model(entry, report.device, dtype, moved=0.0)[0], codes)
            for what, expected in base.items():
                difference = float((found[what].float() - expected.float()).abs().max())
                report.check(f"{name} {str(dtype)[6:]}: {what}", difference, 0.0, "bit for bit")


@torch.no_grad()
def _logits(model: Any, codes: Tensor) -> dict[str, Tensor]:
    """Text logits ``[B, 1, T, card]`` in each regime."""
    found = {"evaluation": model.forward_text(codes)[1]}
    model.train()
    found["training"] = model.forward_text(codes)[1]
    model.eval()
    with model.streaming(codes.shape[0]):
        steps = [model.forward_text(codes[..., t : t + 1])[1].clone() for t in range(codes.shape[-1])]
    return {**found, "streaming": torch.cat(steps, 2)}
