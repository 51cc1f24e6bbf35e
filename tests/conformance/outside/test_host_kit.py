"""The host checks must fail a host that breaks a rule: each mutation is one mistake in the host beside this file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from moshi_ttt.core import testing as kit
from moshi_ttt.core.carry import ForwardContext
from moshi_ttt.core.errors import HostError
from moshi_ttt.core.testing import HOST_CHECKS, HostVariantCase
from tests.conformance.outside import llama
from tests.conformance.outside.test_outside import LLAMA, REGISTRY

CHECKS = {check.__name__: check for check in HOST_CHECKS}
CASE = HostVariantCase(
    on=LLAMA, variant="ttt_linear", options={"chunk": 4}, identity={"gate": {"init": 0.0}}, registry=REGISTRY
)


def sees_the_future_in_a_prefill(patch: pytest.MonkeyPatch) -> None:
    init = llama.Place.__init__

    def broken(self: Any, kept: Tensor, stream: Any) -> None:
        init(self, kept, stream)
        if stream is not None:
            self.allowed = stream.valid[:, None, None].expand_as(self.allowed)

    patch.setattr(llama.Place, "__init__", broken)


def hides_padding_from_attention_alone(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ForwardContext, "run", _without_mask(ForwardContext.run))


def _without_mask(run: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda self, block, x: run(replace(self, token_mask=None), block, x)


def hides_padding_from_blocks_alone(patch: pytest.MonkeyPatch) -> None:
    init = llama.Place.__init__
    patch.setattr(llama.Place, "__init__", lambda self, kept, stream: init(self, torch.ones_like(kept), stream))


def streams_padding_into_blocks(patch: pytest.MonkeyPatch) -> None:
    run = llama.run
    patch.setattr(llama, "run", lambda block, x, context, stream: run(
        block, x, context if stream is None else replace(context, token_mask=None), stream
    ))  # fmt: skip


def keeps_a_reset_row_in_the_cache(patch: pytest.MonkeyPatch) -> None:
    def broken(self: Any, model: Any, mask: Tensor) -> None:
        for site, block in llama.LLAMA_HOST.blocks(model).items():
            block.reset_state(self.states[site], mask)

    patch.setattr(llama.Stream, "reset", broken)


def reset_of_one_row_empties_all(patch: pytest.MonkeyPatch) -> None:
    reset = llama.Stream.reset
    patch.setattr(llama.Stream, "reset", lambda self, model, mask: reset(self, model, torch.ones_like(mask)))


def builds_the_skeleton_with_values(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(llama.LlamaHost, "skeleton", lambda self, config: llama.LlamaModel().eval())


def loads_some_of_the_base(patch: pytest.MonkeyPatch) -> None:
    def broken(self: Any, model: Any, weights: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for name, tensor in self.base_state_dict(model).items():
                tensor.copy_(torch.zeros_like(tensor) if name == "head.bias" else weights[name])

    patch.setattr(llama.LlamaHost, "load_base", broken)


def layers_remember_how_often_they_ran(patch: pytest.MonkeyPatch) -> None:
    forward = llama.Layer.forward

    def broken(self: Any, x: Tensor, *more: Any) -> Tensor:
        self.calls = getattr(self, "calls", 0) + 1
        return forward(self, x * (1 + 0.01 * self.calls), *more)

    patch.setattr(llama.Layer, "forward", broken)


def carries_what_a_layer_left_last(patch: pytest.MonkeyPatch) -> None:
    """A layer that is run again in backward adds to the state that is carried."""

    def broken(self: Any, site: Any, state: dict[str, Tensor]) -> None:
        if self.final is not None:
            before = self.final.get(site, {})
            for name, tensor in state.items():
                given = before[name] + tensor if name in before else tensor.clone()
                before[name] = given
            self.final[site] = before

    patch.setattr(ForwardContext, "record", broken)


def makes_up_the_same_input_for_every_seed(patch: pytest.MonkeyPatch) -> None:
    synthetic_loss = llama.LlamaHost.synthetic_loss
    patch.setattr(
        llama.LlamaHost,
        "synthetic_loss",
        lambda self, model, **given: synthetic_loss(self, model, **{**given, "seed": 0}),
    )


def draws_from_the_global_generator(patch: pytest.MonkeyPatch) -> None:
    synthetic_loss = llama.LlamaHost.synthetic_loss

    def broken(self: Any, model: Any, *, seed: int, **given: Any) -> Tensor:
        return synthetic_loss(self, model, seed=seed + int(torch.randint(1000, ())), **given)

    patch.setattr(llama.LlamaHost, "synthetic_loss", broken)


def loses_the_gradient_of_made_up_input(patch: pytest.MonkeyPatch) -> None:
    synthetic_loss = llama.LlamaHost.synthetic_loss

    def broken(self: Any, model: Any, **given: Any) -> Tensor:
        return synthetic_loss(self, model, **given).detach() + 0 * sum(p.sum() for p in model.parameters())

    patch.setattr(llama.LlamaHost, "synthetic_loss", broken)


def loads_what_there_is(patch: pytest.MonkeyPatch) -> None:
    def broken(self: Any, model: Any, weights: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for name, tensor in self.base_state_dict(model).items():
                if name in weights and weights[name].shape == tensor.shape:
                    tensor.copy_(weights[name])

    patch.setattr(llama.LlamaHost, "load_base", broken)


def writes_before_it_refuses(patch: pytest.MonkeyPatch) -> None:
    load = llama.LlamaHost.load_base

    def broken(self: Any, model: Any, weights: dict[str, Tensor]) -> None:
        with torch.no_grad():
            model.head.bias.copy_(weights["head.bias"])
        load(self, model, weights)

    patch.setattr(llama.LlamaHost, "load_base", broken)


def has_one_fingerprint_for_all_weights(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(llama.LlamaHost, "fingerprint", lambda self, model: {"layers": llama.LAYERS})


def takes_the_fingerprint_of_blocks_too(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(
        llama.LlamaHost, "fingerprint", lambda self, model: {"weights": llama.weight_digest(model.state_dict())}
    )


MUTATIONS: list[tuple[Callable[[pytest.MonkeyPatch], None], str]] = [
    (sees_the_future_in_a_prefill, "check_host_prefill"),
    (hides_padding_from_attention_alone, "check_host_left_padding"),
    (hides_padding_from_blocks_alone, "check_host_left_padding"),
    (streams_padding_into_blocks, "check_host_left_padding"),
    (keeps_a_reset_row_in_the_cache, "check_host_reset"),
    (reset_of_one_row_empties_all, "check_host_rows"),
    (loads_what_there_is, "check_host_base_weights"),
    (writes_before_it_refuses, "check_host_base_weights"),
    (has_one_fingerprint_for_all_weights, "check_host_base_weights"),
    (takes_the_fingerprint_of_blocks_too, "check_host_base_weights"),
    (builds_the_skeleton_with_values, "check_host_skeleton"),
    (loads_some_of_the_base, "check_host_skeleton"),
    (layers_remember_how_often_they_ran, "check_host_checkpointing"),
    (carries_what_a_layer_left_last, "check_host_checkpointing"),
    (makes_up_the_same_input_for_every_seed, "check_host_synthetic_loss"),
    (draws_from_the_global_generator, "check_host_synthetic_loss"),
    (loses_the_gradient_of_made_up_input, "check_host_synthetic_loss"),
]


@pytest.mark.parametrize(("mutation", "check"), MUTATIONS, ids=lambda value: getattr(value, "__name__", value))
def test_mutation_fails_the_kit(
    mutation: Callable[[pytest.MonkeyPatch], None], check: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    mutation(monkeypatch)
    with torch.random.fork_rng(devices=[]), pytest.raises(AssertionError):
        CHECKS[check](CASE)


def test_a_host_without_masks_prefill_skeleton_or_made_up_input_is_asked_for_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bare = replace(CASE, on=replace(LLAMA, prefills=False, skeleton=None, masked_logits=None))
    monkeypatch.delattr(llama.LlamaHost, "synthetic_loss")
    for name in ("prefill", "left_padding", "skeleton", "synthetic_loss"):
        CHECKS[f"check_host_{name}"](bare)


def test_a_host_with_the_earlier_name_of_the_synthetic_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    model, given = LLAMA.model(torch.float32), {"batch_size": 2, "length": 5, "seed": 0}
    with pytest.warns(DeprecationWarning, match=r"LlamaHost\.probe is now LlamaHost\.synthetic_loss"):
        expected = LLAMA.host.probe(model, **given)
    monkeypatch.setattr(llama.LlamaHost, "probe", llama.LlamaHost.synthetic_loss)
    monkeypatch.delattr(llama.LlamaHost, "synthetic_loss")
    with pytest.warns(DeprecationWarning, match=r"LlamaHost\.probe is now LlamaHost\.synthetic_loss"):
        assert torch.equal(LLAMA.host.synthetic_loss(model, **given), expected)


def test_a_host_without_a_synthetic_loss_refuses_under_both_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(llama.LlamaHost, "synthetic_loss")
    model = LLAMA.model(torch.float32)
    for method in (LLAMA.host.probe, LLAMA.host.synthetic_loss):
        with pytest.raises(HostError, match="cannot make synthetic input"):
            method(model, batch_size=2, length=5, seed=0)


def test_a_stream_without_masked_tokens_says_so() -> None:
    with (
        LLAMA.stream(LLAMA.model(torch.float32), 1) as stream,
        pytest.raises(NotImplementedError, match="masked_logits"),
    ):
        kit.HostStream.step_masked(stream, torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1, dtype=torch.bool))
