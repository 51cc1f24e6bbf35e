"""Checks of a variant inside a real host: what shows only when a whole model trains and streams (rules 1-3, 5-8, 13).

A host's package describes itself once as a ``HostCase``; then any variant is checked in it::

    from moshi_ttt.core.testing import host_conformance_tests
    from moshi_ttt.hosts.moshi.testing import moshi_case

    test_on_moshi = host_conformance_tests(moshi_case(), "my_variant", {"chunk": 4}, identity={"gate": {"init": 0.0}})
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from moshi_ttt.core.errors import ContextError
from moshi_ttt.core.registry import Registry, default_registry
from moshi_ttt.core.testing.case import assert_close, assert_equal
from moshi_ttt.core.testing.host_case import LENGTH, TOLERANCE, HostCase, HostStream, HostVariantCase
from moshi_ttt.core.testing.host_checks_lifecycle import (
    check_host_base_weights,
    check_host_checkpointing,
    check_host_refusals,
    check_host_skeleton,
    check_host_synthetic_loss,
    check_host_weights,
)

__all__ = ["HOST_CHECKS", "HostCase", "HostStream", "HostVariantCase", "host_conformance_tests"]


@torch.no_grad()
def check_host_identity(case: HostVariantCase) -> None:
    """With an identity block the logits are bit-equal to the base model's, in one pass and streaming."""
    if case.identity is None:
        return
    tokens = case.on.tokens(2, LENGTH, 1)
    base, model = case.on.model(case.dtype), case.on.model(case.dtype)
    case.inject(model, {**case.options, **case.identity}, excite=False)
    assert_equal(case.on.logits(model, tokens), case.on.logits(base, tokens), "logits of one pass at step 0")
    assert_equal(case.streamed(model, tokens), case.streamed(base, tokens), "streamed logits at step 0")


@torch.no_grad()
def check_host_causality(case: HostVariantCase) -> None:
    """Changing a token leaves the logits before it bit-equal."""
    model, tokens = case.injected(), case.on.tokens(2, LENGTH, 1)
    base = case.on.logits(model, tokens)
    other = case.on.tokens(2, LENGTH, 2)
    for t in (1, LENGTH // 2, LENGTH - 1):
        changed = tokens.clone()
        changed[..., t] = other[..., t]
        logits = case.on.logits(model, changed)
        assert_equal(logits[:, :t], base[:, :t], f"token {t} changed, logits before it")
        assert not torch.equal(logits[:, t:], base[:, t:]), f"token {t} changed and no logits did"


@torch.no_grad()
def check_host_streaming(case: HostVariantCase) -> None:
    """Token by token gives the logits of one pass, and the blocks take part in both."""
    model, tokens = case.injected(), case.on.tokens(2, LENGTH, 1)
    whole = case.on.logits(model, tokens)
    assert not torch.equal(whole, case.on.logits(case.on.model(case.dtype), tokens)), "the blocks change nothing"
    assert_close(case.streamed(model, tokens), whole, TOLERANCE[case.dtype], "streamed logits")


@torch.no_grad()
def check_host_prefill(case: HostVariantCase) -> None:
    """Several tokens in a step, then one at a time, then several again: the logits of one pass."""
    if not case.on.prefills:
        return
    model, tokens = case.injected(), case.on.tokens(2, LENGTH, 1)
    whole = case.on.logits(model, tokens)
    with case.on.stream(model, 2) as stream:
        parts = [stream.step(part) for part in tokens.split([9, 1, 1, 1, LENGTH - 12], dim=-1)]
    assert_close(
        torch.cat(parts, dim=1), whole, TOLERANCE[case.dtype], f"logits of steps of 9, 1, 1, 1 and {LENGTH - 12} tokens"
    )


@torch.no_grad()
def check_host_left_padding(case: HostVariantCase) -> None:
    """Where a host masks tokens: a padded row equals the row alone, in one pass and in a stream that it fills.

    What the masked tokens are reaches no other token.
    """
    if case.on.masked_logits is None:
        return
    model, tokens, other = case.injected(), case.on.tokens(3, LENGTH, 1), case.on.tokens(3, LENGTH, 2)
    padding = (0, 6, 11)
    mask = torch.arange(LENGTH) >= torch.tensor(padding)[:, None]  # [T] and [B, 1] -> [B, T]
    padded = case.on.masked_logits(model, tokens, mask)
    over = mask.view(3, *(1 for _ in tokens.shape[2:]), LENGTH)  # [B, T], or [B, 1, T] over [B, codebooks, T]
    changed = torch.where(over, tokens, other)
    assert_equal(case.on.masked_logits(model, changed, mask)[mask], padded[mask], "logits with other tokens masked")
    with case.on.stream(model, 3) as stream:
        parts = [stream.step_masked(tokens[..., : LENGTH - 4], mask[:, : LENGTH - 4])]
        parts += [stream.step(token) for token in tokens[..., LENGTH - 4 :].split(1, dim=-1)]
    streamed = torch.cat(parts, dim=1)
    for row, first in enumerate(padding):
        alone = case.on.logits(model, tokens[row : row + 1, ..., first:])[0]
        for what, found in (("one pass", padded), ("a stream", streamed)):
            assert_close(found[row, first:], alone, TOLERANCE[case.dtype], f"{what}: the row with {first} masked")


@torch.no_grad()
def check_host_rows(case: HostVariantCase) -> None:
    """Rows that are reset, held or fed other tokens do not change other rows; a held row continues where it was."""
    model = case.injected()
    tokens, other = case.on.tokens(3, LENGTH, 1), case.on.tokens(3, LENGTH, 2)
    undisturbed = case.streamed(model, tokens)
    everyone = torch.ones(3, dtype=torch.bool)
    with case.on.stream(model, 3) as stream:
        fed = tokens.clone()
        fed[2] = other[2]
        for t in range(LENGTH):
            if t == 5:
                stream.reset(torch.tensor([False, True, False]))
            if t == 9:  # a step in which row 0 does not take part
                stream.execute(torch.tensor([False, True, True]))
                stream.step(other[..., t : t + 1])
                stream.execute(everyone)
            logits = stream.step(fed[..., t : t + 1])
            case.assert_same_row(logits[0], undisturbed[0, t : t + 1], f"row 0 at token {t}")


@torch.no_grad()
def check_host_reset(case: HostVariantCase) -> None:
    """A row that is reset equals a stream that starts there."""
    model, tokens = case.injected(), case.on.tokens(2, LENGTH, 1)
    later = case.on.tokens(2, 12, 2)
    fresh = case.streamed(model, later)
    with case.on.stream(model, 2) as stream:
        for t in range(7):
            stream.step(tokens[..., t : t + 1])
        stream.reset(torch.ones(2, dtype=torch.bool))
        for t in range(later.shape[-1]):
            logits = stream.step(later[..., t : t + 1])
            case.assert_same_row(logits, fresh[:, t : t + 1], f"token {t} after the reset")


@torch.no_grad()
def check_host_carry(case: HostVariantCase) -> None:
    """Carried state matters, a new document id resets that row and no other, updates can be disabled.

    Disabling takes a bool or ``[B]`` bool, refuses anything else, and does not follow a tensor that its caller changes.
    """
    model, host = case.injected(), case.on.host
    first, second = case.on.tokens(2, LENGTH, 1), case.on.tokens(2, LENGTH, 2)
    ids = torch.tensor([1, 2])
    with host.carry(model, None, document_ids=ids) as state:
        case.on.logits(model, first)
    with host.carry(model, state, document_ids=ids):
        carried = case.on.logits(model, second)
    with host.carry(model, state, document_ids=torch.tensor([1, 3])):
        one_new = case.on.logits(model, second)
    plain = case.on.logits(model, second)
    assert not torch.equal(carried[1], plain[1]), "the carried state changes nothing"
    assert_equal(one_new[0], carried[0], "a row whose document goes on")
    assert_close(one_new[1], plain[1], TOLERANCE[case.dtype], "a row whose document is new")
    learned = case.on.logits(model, first)
    with host.updates(model, False):
        frozen = case.on.logits(model, first)
        given = torch.tensor([True, False])
        with host.updates(model, given):
            given.fill_(True)
            mixed = case.on.logits(model, first)
        assert_equal(case.on.logits(model, first), frozen, "updates are off again")
    assert not torch.equal(frozen, learned), "disabling updates changes nothing"
    assert_equal(mixed[0], learned[0], "the row whose updates are enabled")
    assert_equal(mixed[1], frozen[1], "the row whose updates are disabled")
    assert_equal(case.on.logits(model, first), learned, "updates are on again")
    wrong: tuple[Any, ...] = (0, None, "off", torch.tensor([1, 0]), torch.ones(2, 1, dtype=torch.bool))
    for value in wrong:
        try:
            with host.updates(model, value):
                raise AssertionError(f"updates took {value!r}, and only a bool or [B] bool is allowed")
        except ContextError:
            continue


@torch.no_grad()
def check_host_volume(case: HostVariantCase) -> None:
    """At volume 0 logits are bit-equal to the base model's, at 1 to those without a volume, row by row and in streams.

    Takes a number from 0 to 10 or ``[B]`` of them, refuses anything else, and does not follow a tensor that its caller
    changes. A stream that starts inside starts at it. Memory learns at volume 0.
    """
    model, host = case.injected(), case.on.host
    tokens = case.on.tokens(2, LENGTH, 1)
    base = case.on.model(case.dtype)
    plain, learned = case.on.logits(base, tokens), case.on.logits(model, tokens)
    streamed, heard = case.streamed(base, tokens), case.streamed(model, tokens)
    given = torch.tensor([0.0, 1.0])
    with host.volume(model, 0):
        assert_equal(case.on.logits(model, tokens), plain, "logits of one pass at volume 0")
        assert_equal(case.streamed(model, tokens), streamed, "streamed logits at volume 0")
        with host.carry(model) as state:
            assert_equal(case.on.logits(model, tokens), plain, "logits of a pass that leaves its state, at volume 0")
        with host.volume(model, given):
            given.fill_(0.5)
            mixed, rows = case.on.logits(model, tokens), case.streamed(model, tokens)
        assert_equal(case.on.logits(model, tokens), plain, "volume is 0 again")
    with host.volume(model, 0.5):
        half = case.on.logits(model, tokens)
    assert not torch.equal(half, plain), "volume 0.5 is volume 0"
    assert not torch.equal(half, learned), "volume 0.5 is volume 1"
    for what, found, base_logits, own in (("one pass", mixed, plain, learned), ("a stream", rows, streamed, heard)):
        assert_equal(found[0], base_logits[0], f"{what}: the row at volume 0")
        assert_equal(found[1], own[1], f"{what}: the row at volume 1")
    assert_equal(case.on.logits(model, tokens), learned, "volume is 1 again")
    later = case.on.tokens(2, LENGTH, 2)
    with host.carry(model, state):
        carried = case.on.logits(model, later)
    assert not torch.equal(carried, case.on.logits(model, later)), "nothing was learned at volume 0"
    wrong: tuple[Any, ...] = (
        -0.5, float("nan"), float("inf"), 10.5, None, "loud", True, torch.tensor([1, 0]), torch.ones(2, 1),
        torch.tensor([0.5, float("nan")]), torch.tensor([0.5, -1.0]), torch.tensor(0.5),
    )  # fmt: skip
    for value in wrong:
        try:
            with host.volume(model, value):
                raise AssertionError(f"volume took {value!r}, and only a number from 0 to 10 or [B] of them is allowed")
        except ContextError:
            continue


HOST_CHECKS: tuple[Callable[[HostVariantCase], None], ...] = (
    check_host_identity,
    check_host_causality,
    check_host_streaming,
    check_host_prefill,
    check_host_left_padding,
    check_host_rows,
    check_host_reset,
    check_host_carry,
    check_host_volume,
    check_host_weights,
    check_host_base_weights,
    check_host_skeleton,
    check_host_checkpointing,
    check_host_synthetic_loss,
    check_host_refusals,
)


def host_conformance_tests(
    on: HostCase,
    variant: str,
    options: Mapping[str, Any] | None = None,
    *,
    identity: Mapping[str, Any] | None = None,
    beside: Mapping[str, Any] | None = None,
    registry: Registry | None = None,
) -> Callable[..., None]:
    """A parametrized pytest test of every host check, in float32 and bfloat16; assign it to a ``test_`` name.

    See ``HostVariantCase`` for ``identity`` and ``beside``.
    """
    import pytest

    cases = [
        HostVariantCase(
            on=on, variant=variant, options=options or {}, identity=identity, beside=beside, dtype=dtype,
            registry=registry or default_registry(),
        )
        for dtype in (torch.float32, torch.bfloat16)
    ]  # fmt: skip

    @pytest.mark.parametrize("check", HOST_CHECKS, ids=lambda check: check.__name__.removeprefix("check_host_"))
    @pytest.mark.parametrize("case", cases, ids=str)
    def conformance(case: HostVariantCase, check: Callable[[HostVariantCase], None]) -> None:
        check(case)

    return conformance
