"""The compiled step of ``ttt_ridge``: the definition, and the same state, step by step, as by tensor operations.

The kit's rules are in test_conformance.py, the option ``backend`` in test_step_backends.py.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from moshi_ttt.core.block import BlockContext
from moshi_ttt.core.config_parsing import parse_block
from moshi_ttt.core.errors import BackendError
from moshi_ttt.core.registry import default_registry
from moshi_ttt.core.state import clone
from moshi_ttt.core.testing import BlockCase, Shape, error
from moshi_ttt.plugins.common import instructions
from moshi_ttt.plugins.ttt_ridge import compiled, memory
from moshi_ttt.plugins.ttt_ridge.compiled import compiled_ridge
from moshi_ttt.plugins.ttt_ridge.naive import naive_ridge
from moshi_ttt.plugins.ttt_ridge.recurrent import recurrent_ridge

RULES = [
    {},
    {"keep": 0.98},
    {"novelty": True},
    {"variance": True},
    {"keep": 0.97, "novelty": True, "variance": True},
]
OPTIONS = [
    {},
    {"features": "relu2", "key_width": 20, "novelty": True},
    {"decay": 0.2, "variance_gate": True, "success_gate": False, "value": "hidden"},
    {"decay": 0.1, "novelty": True, "variance_gate": True, "chunk": 1},
]
SIZES = [(13, 7), (8, 16), (1, 1), (3, 41)]
"""Key and value widths: none, some and all of them no multiple of what the loops take at a time."""


def rule_of(heads, dtype=torch.float64, keep=1.0, novelty=False, variance=False):
    prior = torch.linspace(0.01, 2.0, heads, dtype=dtype)
    learned = (torch.linspace(1.0, 2.0, heads, dtype=dtype), torch.linspace(3.0, 4.0, heads, dtype=dtype))
    return memory.Rule(prior, keep, learned if novelty else None, variance)


def state_of(rule, batch, heads, key, value, dtype=torch.float64):
    like = torch.empty(0, dtype=dtype)
    return clone(memory.initial_state(batch, heads, key, value, like, decays=rule.keep != 1, variance=rule.variance))


def tokens_of(length, batch, heads, key, value, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape):
        return torch.randn(batch, length, heads, *shape, generator=generator, dtype=torch.float64).to(dtype)

    q, k = (torch.nn.functional.normalize(drawn(key), dim=-1) for _ in range(2))
    written = torch.rand(batch, length, generator=generator) < 0.8
    return memory.RidgeTokens(q, k, drawn(value), drawn().sigmoid(), written)


def at(tokens, t):
    return memory.RidgeTokens(*(part[:, t : t + 1] for part in tokens))


def case_of(dtype=torch.float64, **options):
    config = parse_block({"variant": "ttt_ridge", "chunk": 4, **options}, registry=default_registry())
    return BlockCase(variant="ttt_ridge", config=config, shape=Shape(dim=16, heads=2, batch=3), dtype=dtype)


# ---- the memory


@pytest.mark.parametrize(("key", "value"), SIZES)
@pytest.mark.parametrize("options", RULES, ids=str)
def test_it_is_the_definition(options, key, value):
    rule = rule_of(2, **options)
    tokens = tokens_of(23, 2, 2, key, value)._replace(written=torch.ones(2, 23, dtype=torch.bool))
    read, variance, solution = naive_ridge(
        *tokens[:4], rule.regularization, chunk_size=4, keep=rule.keep, novelty=rule.novelty
    )
    state = state_of(rule, 2, 2, key, value)
    found = [compiled_ridge(at(tokens, t), state, rule, 4) for t in range(23)]
    assert error(torch.cat([each.value for each in found], 1), read) < 1e-10
    assert error(state["solution"], solution) < 1e-10
    assert state["position"].tolist() == [3, 3]
    if rule.variance:
        assert error(torch.cat([each.variance for each in found], 1), variance) < 1e-10
    else:
        assert all(each.variance is None for each in found)


@pytest.mark.first_by_default
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("options", RULES, ids=str)
def test_a_long_stream_is_that_of_tensor_operations(options, dtype, limit):
    """Rows that stop and start, tokens that are not written; each row at its own place in its chunk and its turn."""
    rule, tokens = rule_of(2, dtype, **options), tokens_of(1500, 3, 2, 13, 7, dtype)
    active = torch.rand(1500, 3, generator=torch.Generator().manual_seed(1)) < 0.7
    states = [state_of(rule, 3, 2, 13, 7, dtype) for _ in range(2)]
    worst = 0.0
    for t in range(1500):
        expected = recurrent_ridge(at(tokens, t), states[0], rule, 5, active[t])
        found = compiled_ridge(at(tokens, t), states[1], rule, 5, active[t])
        pairs = [(found.value[active[t]], expected.value[active[t]])]
        pairs += [(states[1][name], part) for name, part in states[0].items()]
        if rule.variance:
            pairs.append((found.variance[active[t]], expected.variance[active[t]]))
        worst = max(worst, *(error(*pair) for pair in pairs))
        assert torch.equal(states[1]["covariance"], states[1]["covariance"].mT)
    assert worst < limit
    assert all(len(states[1][name].unique()) > 1 for name in ("position", "coordinate") if name in states[1])


@pytest.mark.parametrize("key", [3, 16, 33])
def test_the_covariance_is_symmetric_to_the_last_bit(key):
    """Decay would double what is not, again and again."""
    rule, tokens = rule_of(2, torch.float32, keep=0.99), tokens_of(500, 2, 2, key, 5, torch.float32)
    state = state_of(rule, 2, 2, key, 5, torch.float32)
    for t in range(500):
        compiled_ridge(at(tokens, t), state, rule, 4)
        assert torch.equal(state["covariance"], state["covariance"].mT)


@pytest.mark.parametrize("options", RULES, ids=str)
def test_a_row_that_is_not_active_is_neither_read_nor_changed(options):
    rule, tokens = rule_of(2, **options), tokens_of(9, 3, 2, 6, 5)
    state = state_of(rule, 3, 2, 6, 5)
    for t in range(8):  # a chunk ends with the next token
        compiled_ridge(at(tokens, t), state, rule, 9)
    for name in ("solution", "pending", "covariance"):
        state[name][1] = math.nan
    before = clone(state)
    spoiled = memory.RidgeTokens(*(part.clone() for part in at(tokens, 8)))
    for part in spoiled[:4]:
        part[1] = math.nan
    read = compiled_ridge(spoiled, state, rule, 9, torch.tensor([True, False, False]))
    assert read.value.isfinite().all()
    assert read.value[1:].abs().max() == 0
    for name, part in before.items():
        assert torch.equal(state[name][1:].nan_to_num(7), part[1:].nan_to_num(7)), name
    assert state["position"].tolist() == [0, 8, 8]


def test_a_token_that_is_not_written_changes_no_bit_of_the_memory():
    rule, tokens = rule_of(2, keep=0.9, novelty=True, variance=True), tokens_of(7, 2, 2, 6, 5)
    state = state_of(rule, 2, 2, 6, 5)
    for t in range(6):
        compiled_ridge(at(tokens, t), state, rule, 8)
    before, last = clone(state), at(tokens, 6)._replace(written=torch.tensor([[False], [True]]))
    read = compiled_ridge(last, state, rule, 8)
    changed = {name for name, part in before.items() if not torch.equal(state[name][0], part[0])}
    assert changed == {"position"}
    assert not torch.equal(state["pending"][1], before["pending"][1])
    expected = recurrent_ridge(last, before, rule, 8)
    assert error(read.value, expected.value) < 1e-12
    assert error(read.variance, expected.variance) < 1e-12


def test_the_next_chunk_reads_the_solution_and_the_variance_of_the_last():
    rule, tokens = rule_of(1, variance=True), tokens_of(4, 1, 1, 4, 3)
    tokens = tokens._replace(written=torch.ones(1, 4, dtype=torch.bool))
    state = state_of(rule, 1, 1, 4, 3)
    for t in range(3):
        read = compiled_ridge(at(tokens, t), state, rule, 4)
        assert read.value.abs().max() == 0
        assert error(read.variance, torch.ones(1, 1, 1)) < 1e-12
    compiled_ridge(at(tokens, 3), state, rule, 4)
    assert torch.equal(state["solution"], state["pending"])
    assert torch.equal(state["covariance_read"], state["covariance"])
    assert state["solution"].abs().max() > 0


@pytest.mark.parametrize("count", [2, 3])
def test_threads_change_no_bit(count):
    found = []
    for threads in (1, count):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            rule, tokens = rule_of(3, torch.float32, **RULES[-1]), tokens_of(12, 3, 3, 21, 9, torch.float32)
            state = state_of(rule, 3, 3, 21, 9, torch.float32)
            reads = [compiled_ridge(at(tokens, t), state, rule, 4) for t in range(12)]
            found.append([part for read in reads for part in read] + list(state.values()))
        finally:
            torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_inputs_and_masks_need_not_be_contiguous():
    rule, tokens = rule_of(2, novelty=True), tokens_of(9, 3, 2, 6, 5)
    mask = torch.rand(3, 9, generator=torch.Generator().manual_seed(1)) < 0.7
    states = []
    for copied in (False, True):
        state = state_of(rule, 3, 2, 6, 5)
        for t in range(9):
            token, active = at(tokens, t), mask[:, t]
            assert not token.q.is_contiguous()
            assert not active.is_contiguous()
            if copied:
                token, active = memory.RidgeTokens(*(part.contiguous() for part in token)), active.contiguous()
            compiled_ridge(token, state, rule, 4, active)
        states.append(state)
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_what_has_no_values_has_the_shapes():
    from torch._subclasses.fake_tensor import FakeTensorMode

    compiled.operation()
    for options in RULES:
        rule, tokens = rule_of(2, **options), tokens_of(1, 3, 2, 6, 5)
        expected = compiled_ridge(tokens, state_of(rule, 3, 2, 6, 5), rule, 4)
        with FakeTensorMode() as mode:
            fake = memory.RidgeTokens(*map(mode.from_tensor, tokens))
            state = {name: mode.from_tensor(part) for name, part in state_of(rule, 3, 2, 6, 5).items()}
            of_rule = replace(rule, regularization=mode.from_tensor(rule.regularization))
            if rule.novelty is not None:
                of_rule = replace(of_rule, novelty=tuple(map(mode.from_tensor, rule.novelty)))
            found = compiled_ridge(fake, state, of_rule, 4)
        assert found.value.shape == expected.value.shape
        assert (found.variance is None) == (expected.variance is None)
        assert found.variance is None or found.variance.shape == expected.variance.shape


# ---- the block


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-12), (torch.float32, 5e-5), (torch.bfloat16, 5e-2)])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_step_of_a_block_is_that_of_tensor_operations(options, dtype, limit):
    """Rows out of step, a token that is not finite, updates that are disabled in a row, a reset."""
    case = case_of(dtype, **options)
    plain, fast = (
        case.at(config=case.config.model_copy(update={"backend": name})).block() for name in ("torch", "cpp")
    )
    x = case.inputs(15)
    x[0, 6] = math.nan
    states = [plain.allocate_state(3), fast.allocate_state(3)]
    generator = torch.Generator().manual_seed(0)
    for t in range(15):
        active = torch.rand(3, generator=generator) < 0.8
        updated = torch.rand(3, generator=generator) < 0.7
        if t == 6:
            active[0] = updated[0] = True
        now = x[:, t : t + 1]
        context = BlockContext(input_embeddings=now, exec_mask=active, updates=updated)
        expected, found = plain.step(now, states[0], context), fast.step(now, states[1], context)
        rows = active & now.isfinite().all(-1)[:, 0]
        assert error(found[rows], expected[rows]) < limit
        assert all(error(states[1][name], states[0][name]) < limit for name in states[0])
        if t == 8:
            for block, state in zip((plain, fast), states, strict=True):
                block.reset_state(state, torch.tensor([False, True, False]))
    assert states[0]["skipped"].tolist() == states[1]["skipped"].tolist() == [1, 0, 0]
    assert plain.backends_in_use() == {"step": ("torch",)}
    assert fast.backends_in_use() == {"step": ("cpp",)}


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_in_the_middle_of_a_stream_it_does_not_matter_who_makes_a_step(options):
    case = case_of(**options)
    block, x = case.block(), case.inputs(15)
    whole, after = case.call(block, x)
    state, steps = block.allocate_state(3), []
    for t in range(15):
        block.use_backend("step", ("torch", "cpp")[t // 3 % 2])
        steps.append(case.step(block, x[:, t : t + 1], state))
    assert error(torch.cat(steps, 1), whole) < 1e-11
    assert all(error(state[name], part) < 1e-11 for name, part in after.items())


# ---- what it refuses


def test_a_state_of_few_digits_is_refused():
    rule, tokens = rule_of(2, torch.bfloat16), tokens_of(1, 2, 2, 6, 5, torch.bfloat16)
    with pytest.raises(
        RuntimeError, match=r"float32 and float64, and was given BFloat16\. Stream by tensor operations"
    ):
        compiled_ridge(tokens, state_of(rule, 2, 2, 6, 5, torch.bfloat16), rule, 4)


def refused(said, change, options=RULES[-1]):
    """Check that a step from a state that ``change`` has changed raises, and that the state stays as it was."""
    rule, tokens = rule_of(2, **options), tokens_of(1, 2, 2, 6, 5)
    state = state_of(rule, 2, 2, 6, 5)
    change(state)
    before = clone(state)
    with pytest.raises(RuntimeError, match=said + r".*Take the state from the block's allocate_state"):
        compiled_ridge(tokens, state, rule, 4)
    assert all(torch.equal(state[name], before[name]) for name in state)


@pytest.mark.parametrize("name", ["solution", "pending", "covariance", "covariance_read"])
def test_a_state_of_another_layout_is_refused(name):
    refused(
        f"'{name}' is Double .2, 2, 5, .*and this block's is",
        lambda state: state.update({name: state[name][:, :, :5].contiguous()}),
    )
    refused(f"'{name}' is Double .*not contiguous", lambda state: state.update({name: state[name].mT.contiguous().mT}))
    refused(f"'{name}' is Float .*and this block's is Double", lambda state: state.update({name: state[name].float()}))


@pytest.mark.parametrize("name", ["position", "coordinate"])
def test_a_counter_of_another_kind_is_refused(name):
    refused(f"'{name}' is Int .*and this block's is Long .2.", lambda state: state.update({name: state[name].int()}))
    refused(f"'{name}' is Long .1.", lambda state: state.update({name: state[name][:1]}))


@pytest.mark.parametrize(("name", "number"), [("position", -1), ("position", 4), ("coordinate", -1), ("coordinate", 6)])
def test_a_place_that_does_not_exist_is_refused(name, number):
    refused(f"'{name}' is {number} in row 1, and this block's is below", lambda state: state[name][1].fill_(number))


@pytest.mark.parametrize(
    ("name", "said"), [("coordinate", "the memory decays"), ("covariance_read", "there is a variance gate")]
)
def test_a_state_of_other_options_is_refused(name, said):
    refused(f"The state has '{name}' where {said}, and only there", lambda state: state.pop(name))
    rule = rule_of(2)
    extra = state_of(rule_of(2, **RULES[-1]), 2, 2, 6, 5)[name]
    refused(f"The state has '{name}' where {said}", lambda state: state.update({name: extra}), {})
    assert name not in state_of(rule, 2, 2, 6, 5)


def test_another_device_is_refused():
    with pytest.raises(BackendError, match=r"state is torch\.float64 on meta; the compiled step is for float32"):
        case_of().block(device="meta").compile_step()


def test_another_processor_is_another_build(monkeypatch, tmp_path):
    before = compiled.LIBRARY.version()
    monkeypatch.setattr(instructions, "CPUINFO", tmp_path / "cpuinfo")
    (tmp_path / "cpuinfo").write_text("processor: 0\nflags\t\t: fpu sse2 other\n", encoding="utf-8")
    assert compiled.LIBRARY.version() != before


def test_where_a_build_fails_the_message_says_what_is_needed(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("CXX", "false")
    monkeypatch.setattr(compiled, "operation", compiled.operation.__wrapped__)
    block = case_of().block()
    with pytest.raises(BackendError, match=r"The compiled step of ttt_ridge cannot be built: false ended with 1"):
        block.compile_step()
    assert [path for path in (tmp_path / "cache").rglob("*") if path.is_file()] == []
    case_of().step(block, case_of().inputs(1), block.allocate_state(3))
    assert block.backends_in_use() == {"step": ("torch",)}, "the block streams as before"
