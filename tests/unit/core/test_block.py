"""The base class of blocks: what every variant gets from it."""

from __future__ import annotations

import pytest
import torch

from moshi_ttt.core import state as states
from moshi_ttt.core.block import BlockContext, Site, SiteKind
from moshi_ttt.core.block_contract import BlockContract
from moshi_ttt.core.errors import ConfigError, ContextError, PrecisionError
from moshi_ttt.core.precision import UNIFORM
from tests.unit.core.toy import DIM, NeedsEmbeddings, ToyBlock, toy_block


def activations(batch: int = 3, length: int = 5, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(batch, length, DIM, generator=torch.Generator().manual_seed(seed)).to(dtype)


def rows(*values: bool) -> torch.Tensor:
    return torch.tensor(values)


def equal(a: states.BlockState, b: states.BlockState) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_site_round_trips_through_its_name():
    site = Site(29, SiteKind.FEED_FORWARD)
    assert str(site) == "layers.29.feed_forward"
    assert Site.parse(str(site)) == site


@pytest.mark.parametrize("text", ["", "layers.1", "blocks.1.sequence", "layers.x.sequence", "layers.1.attention"])
def test_what_is_not_a_site_raises(text):
    with pytest.raises(ValueError):  # noqa: PT011 - the messages are Python's own, by design of the inverse
        Site.parse(text)


def test_no_state_means_the_learned_initial_state():
    block, x = toy_block(), activations()
    y, after = block(x)
    y_given, after_given = block(x, block.init_state(3))
    assert torch.equal(y, y_given)
    assert equal(after, after_given)


def test_masked_row_keeps_its_state():
    block, x = toy_block(), activations()
    before = block.allocate_state(3)
    _, after = block(x, before, BlockContext(exec_mask=rows(True, False, True)))
    _, plain = block(x, before)
    for name in before:
        assert torch.equal(after[name][1], before[name][1])
        assert torch.equal(after[name][[0, 2]], plain[name][[0, 2]])


def test_masked_row_without_a_state_keeps_the_initial_one():
    block = toy_block()
    _, after = block(activations(), None, BlockContext(exec_mask=rows(False, True, True)))
    assert torch.equal(after["memory"][0], block.initial.detach())


def test_reset_row_starts_again_and_leaves_the_others():
    block, x = toy_block(), activations()
    _, used = block(activations(seed=1))
    y, after = block(x, used, BlockContext(reset=rows(False, True, False)))
    y_plain, after_plain = block(x, used)
    y_fresh, after_fresh = block(x)
    assert torch.equal(y[[0, 2]], y_plain[[0, 2]])
    assert torch.equal(y[1], y_fresh[1])
    for name in used:
        assert torch.equal(after[name][[0, 2]], after_plain[name][[0, 2]])
        assert torch.equal(after[name][1], after_fresh[name][1])


def test_reset_passes_a_gradient_to_the_learned_initial_state():
    block = toy_block()
    _, used = block(activations(seed=1))
    y, _ = block(activations(), states.detach(used), BlockContext(reset=rows(False, True, False)))
    y[1].sum().backward()
    assert block.initial.grad is not None
    assert block.initial.grad.abs().max() > 1e-9
    block.initial.grad = None
    y, _ = block(activations(), states.detach(used), BlockContext(reset=rows(False, True, False)))
    y[0].sum().backward()
    assert not block.initial.grad.any(), "a row that was not reset does not start from the initial state"


def test_forward_writes_into_nothing_it_was_given():
    block, x = toy_block(), activations()
    state = block.allocate_state(3)
    kept = states.clone(state), x.clone(), {n: p.detach().clone() for n, p in block.named_parameters()}
    block(x, state, BlockContext(reset=rows(True, False, True), exec_mask=rows(True, True, False)))
    assert equal(state, kept[0])
    assert torch.equal(x, kept[1])
    assert all(torch.equal(p, kept[2][n]) for n, p in block.named_parameters())


@pytest.mark.parametrize(
    "context", [None, BlockContext(exec_mask=rows(True, False, True), reset=rows(True, True, False))]
)
def test_step_is_forward_in_place(context):
    block, x = toy_block(), activations(length=1)
    state = block.allocate_state(3)
    y_forward, after = block(x, states.clone(state), context)
    addresses = [tensor.data_ptr() for tensor in state.values()]
    y_step = block.step(x, state, context)
    assert torch.equal(y_step, y_forward)
    assert equal(state, after)
    assert [tensor.data_ptr() for tensor in state.values()] == addresses
    assert not any(tensor.requires_grad for tensor in state.values())


def test_reset_state_in_place():
    block = toy_block()
    state = block.allocate_state(3)
    block.step(activations(), state)
    used = states.clone(state)
    block.reset_state(state, rows(False, True, False))
    assert torch.equal(state["memory"][1], block.initial.detach())
    assert torch.equal(state["memory"][[0, 2]], used["memory"][[0, 2]])
    again = states.clone(state)
    block.reset_state(state, rows(False, True, False))
    assert equal(state, again)


def test_reset_goes_to_the_learned_weights_not_to_those_at_construction():
    block = toy_block()
    state = block.allocate_state(1)
    with torch.no_grad():
        block.initial.add_(3.0)
    block.reset_state(state, rows(True))
    assert torch.equal(state["memory"][0], block.initial.detach())


def test_state_bytes_are_those_of_one_stream():
    assert toy_block().state_bytes() == 4 * DIM + 8


@pytest.mark.parametrize("cast", [lambda m: m.to(torch.bfloat16), lambda m: m.bfloat16(), lambda m: m.half()])
def test_casting_the_module_keeps_the_dtypes_of_the_policy(cast):
    block = toy_block(dtype=torch.bfloat16)
    before = {name: parameter.detach().clone() for name, parameter in block.named_parameters()}
    cast(torch.nn.Sequential(block))
    for name, parameter in block.named_parameters():
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, before[name])
    block.check_precision("cast")


def test_to_moves_a_block_to_another_device():
    block = toy_block()
    assert block.to(torch.device("meta")).initial.is_meta


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_output_has_the_dtype_of_the_input_and_state_that_of_the_policy(dtype):
    block = toy_block(dtype=dtype)
    y, after = block(activations(dtype=dtype))
    assert y.dtype == dtype
    assert after["memory"].dtype == block.roles.state


# ---- refusals


def test_missing_input_embeddings_raise():
    block = toy_block(cls=NeedsEmbeddings)
    with pytest.raises(ContextError, match=r"layers\.1\.sequence needs the input embeddings"):
        block(activations())
    block(activations(), None, BlockContext(input_embeddings=activations()))


def test_another_width_raises():
    with pytest.raises(ContextError, match=r"width 8, got shape \(3, 5, 4\)"):
        toy_block()(activations()[..., :4])


def test_state_with_another_number_of_rows_raises():
    block = toy_block()
    with pytest.raises(ContextError, match="got 3 rows and a state of 2"):
        block(activations(), block.init_state(2))


def test_state_for_a_block_that_is_not_causal_raises():
    block = toy_block(causal=False)
    with pytest.raises(ContextError, match="not causal"):
        block(activations(), block.init_state(3))


@pytest.mark.parametrize("field", ["exec_mask", "reset"])
@pytest.mark.parametrize("mask", [rows(True), rows(True, False), rows(True, False, True, True)], ids=len)
def test_mask_with_another_number_of_rows_raises(field, mask):
    block = toy_block()
    with pytest.raises(ContextError, match=field):
        block(activations(), block.init_state(3), BlockContext(**{field: mask}))


def test_step_refuses_a_state_of_another_form_and_leaves_it():
    block = toy_block()
    state = block.allocate_state(3) | {"of_another_block": torch.zeros(3)}
    before = states.clone(state)
    with pytest.raises(ValueError, match="of_another_block"):
        block.step(activations(), state)
    assert equal(state, before)


def test_parameter_in_the_wrong_dtype_is_named_at_the_first_step():
    block = toy_block(dtype=torch.bfloat16)
    block.gate = torch.nn.Parameter(block.gate.detach().bfloat16())
    with pytest.raises(PrecisionError, match=r"call, layers\.1\.sequence: gate is torch\.bfloat16"):
        block(activations(dtype=torch.bfloat16))


def test_state_in_the_wrong_dtype_is_named_at_the_first_step():
    block = toy_block(dtype=torch.bfloat16)
    state = states.map_state(lambda t: t.bfloat16() if t.is_floating_point() else t, block.init_state(3))
    with pytest.raises(PrecisionError, match=r"memory is torch\.bfloat16.*role 'state'"):
        block(activations(dtype=torch.bfloat16), state)


def test_uniform_policy_keeps_the_state_in_the_model_dtype():
    block = toy_block(policy=UNIFORM, dtype=torch.bfloat16)
    assert block.init_state(1)["memory"].dtype == torch.bfloat16
    block(activations(dtype=torch.bfloat16))


class Steps(ToyBlock):
    """A third party's step, which keeps gradients enabled."""

    def step(self, x, state, context=None):
        y, after = self(x, state, context)
        states.copy_(state, states.detach(after))
        return y


def test_what_a_block_inherits_is_guarded_where_it_is_defined():
    class Inherits(Steps):
        pass

    guarded = {"step", "statistics", "inner_losses", "drift"}
    assert guarded & vars(Inherits).keys() == set()
    assert Inherits.step is Steps.step
    assert Inherits.drift is BlockContract.drift


@pytest.mark.parametrize("block", [ToyBlock, Steps], ids=lambda block: block.__name__)
@pytest.mark.parametrize("needed", ["parameters", "x", "state"])
def test_a_gradient_that_a_step_would_lose_is_refused_in_backward(block, needed):
    made, x = toy_block(cls=block), activations(length=1)
    state = made.allocate_state(3)
    made.requires_grad_(needed == "parameters")
    if needed == "x":
        x.requires_grad_()
    if needed == "state":
        state["memory"].requires_grad_()
    y = made.step(x, states.clone(state) if needed != "state" else state)
    with pytest.raises(ContextError, match=r"layers\.1\.sequence streamed this pass.*host\.carry.*torch\.no_grad"):
        y.sum().backward()
    assert x.grad is None
    assert all(parameter.grad is None for parameter in made.parameters())


def test_a_step_refuses_no_gradient_that_it_does_not_lose():
    made, x = toy_block(), activations(length=1)
    head = torch.nn.Linear(DIM, 1)
    head(made.step(x, made.allocate_state(3)).detach()).sum().backward()
    torch.autograd.grad(head(made.step(x, made.allocate_state(3))).sum(), head.weight)  # stops above the block
    with torch.no_grad():
        assert not made.step(x, made.allocate_state(3)).requires_grad
    made.requires_grad_(False)
    head(made.step(x, made.allocate_state(3))).sum().backward()
    assert head.weight.grad is not None


def test_the_output_of_a_step_may_be_written_to_while_gradients_are_enabled():
    made, x = toy_block(), activations(length=1)
    made.step(x, made.allocate_state(3)).add_(x)


@pytest.fixture
def dynamo():
    """The compiler, which forgets afterwards what it met here: it leaves code that raised alone from then on."""
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_step_refuses_a_gradient_too(backend, dynamo):
    made, x = toy_block(), activations(length=1)
    step = torch.compile(made.step, backend=backend)
    y = step(x, made.allocate_state(3))
    with pytest.raises(ContextError, match="streamed this pass"):
        y.sum().backward()
    with torch.no_grad():
        assert torch.equal(step(x, made.allocate_state(3)), y)


def test_a_parameter_without_a_dimension_cannot_be_sharded():
    block = toy_block()
    block.check_shardable()
    block.extra = torch.nn.Parameter(torch.zeros(()))
    with pytest.raises(ConfigError, match=r"layers\.\d+\.\w+: extra has no dimension.*Give it the shape \[1\]"):
        block.check_shardable()
