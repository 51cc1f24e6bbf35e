"""Checks of a variant's life in a host: weights, meta device, checkpointing, synthetic input (rules 4, 6, 7, 8)."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moshi_ttt.core.adapter import load_adapter, save_adapter
from moshi_ttt.core.config_parsing import parse_block
from moshi_ttt.core.errors import HostError, MoshiTTTError
from moshi_ttt.core.host import CarriedState
from moshi_ttt.core.injection import make_plan
from moshi_ttt.core.precision import FP32_STATE
from moshi_ttt.core.testing.case import assert_equal
from moshi_ttt.core.testing.host_case import LENGTH, HostVariantCase


def check_host_weights(case: HostVariantCase) -> None:
    """No base name changes, base weights load after injection, removal and an adapter's round trip are bit-equal."""
    tokens = case.on.tokens(2, LENGTH, 1)
    base = case.on.model(case.dtype)
    with torch.no_grad():
        expected = case.on.logits(base, tokens)
    names = set(base.state_dict())
    injection = case.inject(base)
    assert names <= set(base.state_dict()), "a base parameter was renamed"
    case.on.host.load_base(base, case.on.host.base_state_dict(case.on.model(case.dtype)))
    other = case.on.model(case.dtype)
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        injected = case.on.logits(base, tokens)
        save_adapter(injection, Path(folder) / "adapter")
        load_adapter(other, Path(folder) / "adapter", registry=case.registry)
        assert_equal(case.on.logits(other, tokens), injected, "logits with the loaded adapter")
        injection.remove()
        assert_equal(case.on.logits(base, tokens), expected, "logits after removal")
    assert set(base.state_dict()) == names, "removal leaves something behind"


def check_host_refusals(case: HostVariantCase) -> None:
    """A specification that matches no site raises and leaves the model alone; ``none`` is allowed."""
    model = case.on.model(case.dtype)
    before = set(model.state_dict())
    for layers, message in (("900", "out of range"), ("first:0", "first:0"), ("", "cannot read")):
        config = parse_block({"variant": case.variant, "layers": layers, **case.options}, registry=case.registry)
        said = "nothing"
        try:
            make_plan(model, case.on.host, [config], policy=FP32_STATE, registry=case.registry)
        except MoshiTTTError as error:
            said = str(error)
        assert message in said, f"layers {layers!r} should be refused with {message!r}, the error says: {said}"
    nothing = parse_block({"variant": case.variant, "layers": "none", **case.options}, registry=case.registry)
    plan = make_plan(model, case.on.host, [nothing], policy=FP32_STATE, registry=case.registry)
    assert plan.blocks == ()
    assert set(model.state_dict()) == before


@torch.no_grad()
def check_host_base_weights(case: HostVariantCase) -> None:
    """Base weights load strictly: what is missing, unexpected or of another shape is refused, and nothing is written.

    The fingerprint is the same with and without blocks, can be written as JSON, and differs where weights differ.
    """
    host, model, other = case.on.host, case.on.model(case.dtype), case.on.model(case.dtype)
    before = host.fingerprint(model)
    assert json.loads(json.dumps(before)) == before, "the fingerprint does not survive JSON"
    case.inject(model)
    assert host.fingerprint(model) == before, "the fingerprint is another one with blocks"
    weights = {name: tensor.detach().clone() for name, tensor in host.base_state_dict(other).items()}
    changed = {name: 0.5 * t if t.is_floating_point() else t for name, t in weights.items()}
    name = max(weights, key=lambda each: weights[each].dim())
    for what, given in (
        ("without one of them", {key: t for key, t in changed.items() if key != name}),
        ("with one more", {**changed, "not_a_weight": torch.zeros(1)}),
        ("with one of another shape", {**changed, name: changed[name][:0]}),
    ):
        try:
            host.load_base(model, given)
        except HostError:
            pass
        else:
            raise AssertionError(f"base weights {what} were loaded")
        for key, tensor in host.base_state_dict(model).items():
            assert_equal(tensor, weights[key], f"base weights {what} were refused, {key}")
    host.load_base(model, changed)
    for key, tensor in host.base_state_dict(model).items():
        assert_equal(tensor, changed[key], f"{key} after loading")
    assert host.fingerprint(model) != before, "the fingerprint does not depend on the weights"


@torch.no_grad()
def check_host_skeleton(case: HostVariantCase) -> None:
    """A model that is planned on the meta device and filled afterwards is the one that was built with its weights."""
    if case.on.skeleton is None:
        return
    tokens, host = case.on.tokens(2, LENGTH, 1), case.on.host
    base = case.on.model(case.dtype)
    weights = {name: tensor.clone() for name, tensor in host.base_state_dict(base).items()}
    plain = case.on.logits(base, tokens)
    case.inject(base, excite=False)
    expected = case.on.logits(base, tokens)
    model = case.on.skeleton(case.dtype)
    injection = case.inject(model, excite=False)
    built = [name for name, tensor in model.state_dict().items() if not tensor.is_meta]
    assert not built, f"the skeleton, or its blocks, has values: {', '.join(built[:5])}"
    model.to_empty(device="cpu")
    host.load_base(model, weights)
    injection.initialize()
    assert_equal(case.on.logits(model, tokens), expected, "logits of the skeleton, filled")
    injection.remove()
    assert_equal(case.on.logits(model, tokens), plain, "logits of the skeleton without its blocks")


def check_host_checkpointing(case: HostVariantCase) -> None:
    """Gradients with the host's layers checkpointed are bit-equal to those without, also with carried state.

    A layer that is run again in backward sees what it saw, and leaves no state a second time.
    """
    tokens, later = case.on.tokens(2, LENGTH, 1), case.on.tokens(2, LENGTH, 2)
    results = []
    for checkpointed in (False, True):
        model = case.on.model(case.dtype)
        injection, left = case.inject(model), CarriedState()
        with _checkpointed(case, model) if checkpointed else _plainly():
            logits = case.on.logits(model, tokens)
            logits.float().square().mean().backward()
            with case.on.host.carry(model) as state:
                for part in (tokens, later):
                    case.on.logits(model, part).float().square().mean().backward()
                left = CarriedState(dict(state.blocks))
        gradients = {name: parameter.grad for name, parameter in injection.named_parameters()}
        results.append((logits.detach(), gradients, left))
    (logits, gradients, left), (again, given, kept) = results
    assert_equal(again, logits, "logits with checkpointed layers")
    for name, gradient in gradients.items():
        there = given[name]
        assert (gradient is None) == (there is None), f"{name} has a gradient only on one side"
        if gradient is not None and there is not None:
            assert_equal(there, gradient, f"gradient of {name} with checkpointed layers")
    assert left.blocks.keys() == kept.blocks.keys(), "checkpointed layers leave the states of other sites"
    for site, block in left.blocks.items():
        for name, tensor in block.items():
            assert_equal(kept.blocks[site][name], tensor, f"{site}: carried state {name!r} with checkpointed layers")


@contextmanager
def _plainly() -> Iterator[None]:
    yield


@contextmanager
def _checkpointed(case: HostVariantCase, model: nn.Module) -> Iterator[None]:
    """Inside, every unit of sharding that is not a block or the whole model is checkpointed."""
    blocks = {id(block) for block in case.on.host.blocks(model).values()}
    units = [unit for unit in case.on.host.fsdp_units(model) if unit is not model and id(unit) not in blocks]
    assert units, "the host has no unit of sharding but the model and its blocks"
    for unit in units:
        unit.forward = partial(checkpoint, unit.forward, use_reentrant=False)
    try:
        yield
    finally:
        for unit in units:
            del unit.forward


def check_host_synthetic_loss(case: HostVariantCase) -> None:
    """The loss on synthetic input depends on the seed alone, and trains the blocks. Hosts without one are left out."""
    model = case.on.model(case.dtype)
    injection = case.inject(model)

    def loss(seed: int) -> Tensor:
        return case.on.host.synthetic_loss(model, batch_size=2, length=LENGTH, seed=seed)

    try:
        first = loss(0)
    except HostError:
        return
    assert first.dim() == 0, f"a loss is one number, got shape {tuple(first.shape)}"
    assert bool(first.isfinite()), f"the loss is {first.item()}"
    first.backward()
    assert any(
        parameter.grad is not None and bool((parameter.grad != 0).any()) for parameter in injection.parameters()
    ), "no gradient of the loss reaches a block"
    torch.rand(3)  # the seed decides, not what was drawn before
    with torch.no_grad():
        assert_equal(loss(0), first.detach(), "the loss of the same seed")
        assert not torch.equal(loss(1), first.detach()), "another seed gives the same loss"
