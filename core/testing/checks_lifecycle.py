"""Checks of a block's life in a host: plan, save and load, options, dtypes (rules 6, 7, 8, 9)."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import torch
from pydantic import BaseModel, ValidationError

from moshi_ttt.core.adapter import load_adapter, save_adapter
from moshi_ttt.core.block import SequenceBlock
from moshi_ttt.core.casts import ParameterCasts
from moshi_ttt.core.config import BlockConfig
from moshi_ttt.core.config_parsing import parse_block
from moshi_ttt.core.errors import MoshiTTTError
from moshi_ttt.core.initial_values import initialize_blocks
from moshi_ttt.core.injection import Injection, Plan, make_plan
from moshi_ttt.core.testing.case import BlockCase, assert_equal
from moshi_ttt.core.testing.toy_host import TOY_HOST, ToyHost, ToyModel, toy_registry


def _plan(case: BlockCase, model: ToyModel) -> Plan:
    host = TOY_HOST if case.causal else ToyHost(causal=False)
    config = case.config.model_copy(update={"layers": (1,)})
    return make_plan(model, host, [config], policy=case.policy, registry=case.registry)


def _model(case: BlockCase, device: str = "cpu") -> ToyModel:
    return ToyModel(case.shape.dim, case.shape.heads, num_layers=2, dtype=case.dtype, device=device)


def _excite(injection: Injection) -> None:
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in injection.parameters():
            parameter.add_((0.1 * torch.randn(parameter.shape, generator=generator)).to(parameter))


def check_plan_figures(case: BlockCase) -> None:
    """The plan's parameter count and state bytes are what injection adds; removal gives back a bit-identical model."""
    model, x = _model(case), case.inputs(2 * case.chunk + 1)
    with torch.no_grad():
        base = model(x)
    count = sum(parameter.numel() for parameter in model.parameters())
    names = set(model.state_dict())
    plan = _plan(case, model)
    injection = plan.apply(model)
    assert sum(parameter.numel() for parameter in model.parameters()) - count == plan.parameters
    assert names <= set(model.state_dict()), f"base names changed: {sorted(names - set(model.state_dict()))}"
    (block,) = injection.blocks.values()
    storage = sum(t.numel() * t.element_size() for t in block.allocate_state(1).values())
    assert storage == plan.state_bytes, f"a stream takes {storage} bytes, the plan says {plan.state_bytes}"
    assert plan.blocks[0].flops_per_token > 0
    kept = _kept_casts(case, block)
    assert kept <= plan.cast_bytes, f"a stream keeps {kept} bytes of casts, the plan says {plan.cast_bytes}"
    assert all(not p.is_meta and p.device == next(model.parameters()).device for p in block.parameters())
    injection.remove()
    assert set(model.state_dict()) == names
    with torch.no_grad():
        assert_equal(model(x), base, "the model after removal")


def _kept_casts(case: BlockCase, block: SequenceBlock) -> int:
    """Bytes of the copies that a stream keeps after a step."""
    casts = ParameterCasts(block, frozen=True)
    if case.causal:
        with torch.no_grad():
            case.step(block, case.inputs(1, batch=1), block.allocate_state(1), casts=casts)
    return casts.bytes


def check_adapter_round_trip(case: BlockCase) -> None:
    """Saving and loading is bit-equal, dtypes included, and the reloaded model computes the same."""
    case = case.anywhere()  # what computes it is not saved
    case = case.anywhere()  # an adapter does not keep what was chosen for a machine
    x = case.inputs(2 * case.chunk + 1)
    model = _model(case)
    injection = _plan(case, model).apply(model)
    _excite(injection)
    with torch.no_grad():
        expected = model(x)
    registry = toy_registry(case.registry, causal=case.causal)
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(injection, Path(folder) / "adapter", training_step=3)
        other = _model(case)
        loaded = load_adapter(other, Path(folder) / "adapter", registry=registry)
    saved = dict(injection.named_parameters())
    assert saved.keys() == dict(loaded.named_parameters()).keys()
    for name, parameter in loaded.named_parameters():
        assert parameter.dtype == saved[name].dtype, f"{name}: {parameter.dtype} after loading"
        assert_equal(parameter.detach(), saved[name].detach(), f"{name} after loading")
    with torch.no_grad():
        assert_equal(other(x), expected, "the model after loading")


def check_buffers(case: BlockCase) -> None:
    """``reset_parameters`` gives every buffer its value, ``reset_unsaved`` every buffer that no adapter holds; what
    ``state_dict`` has survives saving and loading.
    """
    fresh, late = _model(case), _model(case)
    first = _plan(case, fresh).apply(fresh)
    ((site, block),) = first.blocks.items()
    second = _plan(case, late).apply(late)
    (other,) = second.blocks.values()
    with torch.no_grad():
        for tensor in (*other.parameters(), *other.buffers()):
            tensor.copy_(torch.full_like(tensor, 1))  # what a build on the meta device leaves undefined
    initialize_blocks({site: other}, first.plan.seed)
    for name, buffer in other.named_buffers():
        assert_equal(buffer, block.get_buffer(name), f"buffer {name!r} after reset_parameters")
    with torch.no_grad():
        for tensor in (*other.parameters(), *other.buffers()):
            tensor.copy_(torch.full_like(tensor, 1))
    second.initialize(saved=False)
    for name in {name for name, _ in other.named_buffers()} - other.persistent_buffers().keys():
        assert_equal(other.get_buffer(name), block.get_buffer(name), f"buffer {name!r} after reset_unsaved")
    for buffer in block.buffers():
        buffer.copy_(buffer + torch.ones_like(buffer))
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(first, Path(folder) / "adapter")
        registry = toy_registry(case.registry, causal=case.causal)
        (loaded,) = load_adapter(_model(case), Path(folder) / "adapter", registry=registry).blocks.values()
    have = loaded.state_dict()
    for name, tensor in block.state_dict().items():
        assert have[name].dtype == tensor.dtype, f"{name}: {have[name].dtype} after loading"
        assert_equal(have[name], tensor, f"{name} after loading")


def check_config_keys(case: BlockCase) -> None:
    """Every option survives a round trip through JSON, and changing it changes the block.

    Changing one of ``machine_options`` changes no result, and may change nothing in a call.
    """
    values = case.config.model_dump(mode="json")
    assert parse_block(values, registry=case.registry) == case.config, "the config does not survive a round trip"
    if case.dtype != torch.float64:
        return
    case = case.anywhere()  # what is chosen for a machine may have no use for an option, and changes no result
    values = case.config.model_dump(mode="json")
    unchanged = frozenset(("variant", "layers")) | case.config.machine_options
    options = {key: value for key, value in values.items() if key not in unchanged}
    outcome = dict.fromkeys(_paths(options), "no other value that the kit tried is accepted")
    behaviour: dict[frozenset[str], dict[str, torch.Tensor] | None] = {}
    for path, changed in _changes(values, case.config, unchanged):
        if outcome[path] == "changes":
            continue
        for left_out in _left_out(path.partition(".")[0], values):
            after = _behaviour_of(case, changed, left_out)
            if after is not None and left_out not in behaviour:
                behaviour[left_out] = _behaviour_of(case, values, left_out)
            if after is None or (before := behaviour[left_out]) is None:
                continue  # not a legal value, one that does not fit this host, or one that excludes another option
            differs = before.keys() != after.keys() or any(
                before[n].shape != after[n].shape or not torch.equal(before[n], after[n]) for n in before
            )
            outcome[path] = "changes" if differs else "changes nothing"
            break
    idle = {path: what for path, what in outcome.items() if what != "changes"}
    assert not idle, f"options without an effect: {idle}"


def _paths(values: dict[str, Any]) -> Iterator[str]:
    """Dotted names of all options."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from (f"{key}.{inner}" for inner in _paths(value))
        else:
            yield key


def _left_out(key: str, values: dict[str, Any]) -> Iterator[frozenset[str]]:
    """Options to leave at their defaults while ``key`` changes: none; each other, which it may exclude; all others."""
    others = set(values) - {"variant", "layers", key}
    yield frozenset()
    yield from (frozenset((other,)) for other in sorted(others))
    yield frozenset(others)


def _behaviour_of(case: BlockCase, values: dict[str, Any], left_out: frozenset[str]) -> dict[str, torch.Tensor] | None:
    """None where the values are refused."""
    try:
        kept = {key: value for key, value in values.items() if key not in left_out}
        return _behaviour(case, parse_block(kept, registry=case.registry))
    except (MoshiTTTError, ValidationError):
        return None


def _behaviour(case: BlockCase, config: BlockConfig) -> dict[str, torch.Tensor]:
    """Initial values, outputs over three chunks after a fixed disturbance of the parameters, what backward needs."""
    case = case.at(compiled_step=False, config=config)  # a step has no part in a call, and an option may refuse it
    block: SequenceBlock = case.block()
    kept = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y, _ = case.call(block, case.inputs(3 * case.chunk))
    block.reset_parameters(torch.Generator().manual_seed(0))
    initial = {f"initial {name}": parameter.detach() for name, parameter in block.named_parameters()}
    return {"y": y.detach(), "kept for backward": torch.tensor(kept), **initial}


def _changes(
    values: dict[str, Any], model: BaseModel, unchanged: frozenset[str]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """For every option but those ``unchanged``: its dotted name, and all values with that one changed."""
    for key, value in values.items():
        if key in unchanged:
            continue
        for path, changed in _alternatives(key, value, model):
            yield path, {**values, key: changed}


def _alternatives(key: str, value: Any, model: BaseModel) -> Iterator[tuple[str, Any]]:
    if isinstance(value, bool):
        yield key, not value
    elif isinstance(value, int):
        yield key, value + 1
        yield key, max(value - 1, 0)
    elif isinstance(value, float):
        for changed in (value * 1.5 + 1e-7, value * 0.5, value * 0.9 + 0.05):
            yield key, changed
    elif value is None:  # an optional number or list of them, as far as the kit can tell
        yield from ((key, changed) for changed in (0.01, 2, [3, 3]))
    elif isinstance(value, list):
        yield key, value[:-1]
        for _, last in _alternatives(key, value[-1], model) if value else ():
            yield key, [*value[:-1], last]
    elif isinstance(value, dict):
        for inner, item in value.items():
            for path, changed in _alternatives(inner, item, getattr(model, key)):
                yield f"{key}.{path}", {**value, inner: changed}
    elif isinstance(value, str):
        for option in (*_literals(type(model).model_fields[key].annotation), f"{value}_other", 3):
            if option != value:
                yield key, option


def _literals(annotation: Any) -> Iterator[str]:
    """The strings that an annotation allows by name, through unions."""
    for argument in get_args(annotation):
        if isinstance(argument, str):
            yield argument
        else:
            yield from _literals(argument)


def check_dtypes(case: BlockCase) -> None:
    """Parameters have the master dtype after build, meta init, loading and ``.to(bfloat16)``; nothing stays on meta."""
    roles = case.policy.roles(case.dtype)
    model = _model(case, device="meta")
    injection = _plan(case, model).apply(model)
    assert all(parameter.is_meta for parameter in injection.parameters()), "a block left its meta-device host"
    model.to_empty(device="cpu")
    injection.initialize()
    direct = _model(case)
    expected = dict(_plan(case, direct).apply(direct).named_parameters())
    for name, parameter in injection.named_parameters():
        assert not parameter.is_meta, f"{name} is still on meta"
        assert_equal(parameter.detach(), expected[name].detach(), f"{name} initialized after meta, against directly")
    for when, cast in (("build", None), (".to(bfloat16)", torch.bfloat16), (".to(float32)", torch.float32)):
        kept = {name: parameter.detach().clone() for name, parameter in injection.named_parameters()}
        if cast is not None:
            model.to(cast)
        for name, parameter in injection.named_parameters():
            assert parameter.dtype == roles.master, f"after {when}: {name} is {parameter.dtype}, not {roles.master}"
            assert_equal(parameter.detach(), kept[name], f"{name} after {when}")
        injection.check_precision(when)
