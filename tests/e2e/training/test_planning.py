"""Plans: against what FSDP2 itself makes of a model, against torch's own way to cut, and for the 7B."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import pytest
import torch
import torch.distributed as dist
import yaml
from rich.console import Console
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.testing._internal.distributed.fake_pg import FakeStore

from moshi_ttt import default_registry
from moshi_ttt.configs.settings import Settings, parse_settings
from moshi_ttt.core import state as states
from moshi_ttt.core.errors import ConfigError, HostError
from moshi_ttt.core.sharding import shard
from moshi_ttt.hosts.moshi.host import MOSHI_HOST
from moshi_ttt.training import plan_tables, planning
from moshi_ttt.training.model import build, skeleton
from moshi_ttt.training.planning import TrainingPlan
from moshi_ttt.training.runtime import start
from moshi_ttt.training.trained import TrainedModel

BLOCKS = [{"variant": "ttt_linear", "layers": "1,3", "chunk": 4}]
LORA = {"enable": True, "rank": 4}
RUNS = {
    "blocks": {},
    "blocks and LoRA": {"lora": LORA},
    "LoRA and embeddings": {"ttt": [], "lora": {**LORA, "ft_embed": True}},
    "everything": {"full_finetuning": True},
    "bfloat16": {"param_dtype": "bfloat16", "lora": LORA},
}
BASE_7B, BLOCKS_7B = 7_687_729_152, 214_474_944


def values(**changes: Any) -> dict[str, Any]:
    chosen = {
        "data": {"train_data": "none.jsonl"}, "run_dir": "run", "moshi_paths": {"hf_repo_id": "builtin:tiny"},
        "param_dtype": "float32", "ttt": BLOCKS, **changes,
    }  # fmt: skip
    return {key: value for key, value in chosen.items() if value is not None}


def settings(**changes: Any) -> Settings:
    return parse_settings(values(**changes), registry=default_registry(), where="test")


def plan(ranks: int = 1, **changes: Any) -> TrainingPlan:
    return planning.plan(settings(**changes), default_registry(), ranks=ranks)


@contextmanager
def pretended(rank: int, ranks: int) -> Iterator[None]:
    """A process group that does nothing, in which this process is one of many."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ranks)
    try:
        yield
    finally:
        dist.destroy_process_group()


def shards(built: TrainedModel, ranks: int) -> list[Any]:
    """What FSDP2 holds for each parameter, by unit, after sharding over all ranks of the group."""
    shard(MOSHI_HOST, built.model, built.roles, init_device_mesh("cpu", (ranks,)))
    units = [module for module in built.model.modules() if isinstance(module, FSDPModule)]
    return [unit._get_fsdp_state()._fsdp_param_group for unit in units]


def said(plan: TrainingPlan) -> str:
    shown = io.StringIO()
    Console(width=110, file=shown).print(plan_tables.render(plan))
    return " ".join(shown.getvalue().replace("│", " ").split())


@pytest.mark.first_by_default
@pytest.mark.parametrize("ranks", [3, 1, 2, 7])
@pytest.mark.parametrize("run", RUNS)
def test_a_rank_holds_what_fsdp_gives_it(run, ranks):
    chosen = settings(**RUNS[run])
    planned = planning.plan(chosen, default_registry(), ranks=ranks)
    held = []
    for rank in range(ranks):
        built = skeleton(chosen, default_registry())
        with pretended(rank, ranks):
            units = shards(built, ranks)
            local = [param.sharded_param for unit in units for param in unit.fsdp_params]
            held.append(sum(p.to_local().numel() * p.dtype.itemsize for p in local))
            trained = [p for p in built.model.parameters() if p.requires_grad]
            gradients = sum(p.to_local().numel() * p.dtype.itemsize for p in trained)
        if rank == 0:
            assert (planned.rank.gradients, planned.rank.moments) == (gradients, 2 * gradients)
            whole = []
            for unit in units:
                dtype = unit.mp_policy.param_dtype
                whole.append(sum(p._orig_size.numel() * (dtype or p.orig_dtype).itemsize for p in _typed(unit)))
            assert sorted(unit.gathered_bytes for unit in planned.units) == sorted(whole)
    assert planned.rank.parameters == held[0] == max(held)


def _typed(unit: Any) -> list[Any]:
    """The unit's parameters, which know their dtypes only from now on."""
    for param in unit.fsdp_params:
        param.init_dtype_attrs(unit.mp_policy)
    return list(unit.fsdp_params)


@pytest.mark.first_by_default
@pytest.mark.parametrize("ranks", [1, 2, 3, 5, 8, 100, 1000])
def test_a_rank_holds_the_first_of_torchs_chunks(ranks):
    chosen = settings(param_dtype="bfloat16", lora=LORA)
    planned = planning.plan(chosen, default_registry(), ranks=ranks)
    model = skeleton(chosen, default_registry()).model
    sizes = [
        (max(chunk.numel() for chunk in parameter.chunk(ranks)) * parameter.element_size(), parameter.requires_grad)
        for parameter in model.parameters()
    ]
    assert planned.rank.parameters == sum(size for size, _ in sizes)
    assert planned.rank.gradients == sum(size for size, trained in sizes if trained)


def test_groups_are_those_of_the_optimizer():
    rates = {"lr": 1e-3, "lr_groups": {"gates": 0.5, "lora": 1e-5}}
    planned = plan(lora=LORA, optim=rates, param_dtype="bfloat16")
    found = {group.name: group for group in planned.groups}
    assert {name: group.learning_rate for name, group in found.items()} == {
        "ttt": 1e-3, "gates": 0.5, "lora": 1e-5, "frozen": None,
    }  # fmt: skip
    assert {name: group.stored_as for name, group in found.items()} == {
        "ttt": "float32", "gates": "float32", "lora": "float32", "frozen": "bfloat16",
    }  # fmt: skip
    model = skeleton(settings(lora=LORA), default_registry()).model
    assert sum(group.parameters for group in planned.groups) == sum(p.numel() for p in model.parameters())
    assert sum(group.tensors for group in planned.groups) == len(list(model.parameters()))
    assert {group.name for group in plan(full_finetuning=True).groups} == {"ttt", "gates", "base", "frozen"}


def test_units_are_those_of_the_host():
    planned = plan(ranks=2)
    model = skeleton(settings(), default_registry()).model
    assert len(planned.units) == len(MOSHI_HOST.fsdp_units(model))
    assert planned.units[-1].name == planning.ROOT
    assert {"transformer.layers.1.ttt.block", "transformer.layers.0", "depformer.layers.1"} <= {
        unit.name for unit in planned.units
    }
    others = max(unit.gathered_bytes for unit in planned.units[:-1])
    assert planned.rank.gathered == planned.units[-1].gathered_bytes + 2 * others
    assert planned.largest_unit.gathered_bytes == max(others, planned.units[-1].gathered_bytes)


def test_gradients_wait_for_the_last_microbatch():
    once, often = plan(ranks=4), plan(ranks=4, num_microbatches=3)
    trained = sum(group.parameters for group in once.groups if group.name != planning.FROZEN)
    assert once.rank.unreduced == max(unit.unreduced_bytes for unit in once.units) < 4 * trained
    assert often.rank.unreduced == 4 * trained
    assert "exchange them once a step" in said(often)
    everything = {"full_finetuning": True, "num_microbatches": 3}  # whole, they would be more than all else
    assert plan(ranks=4, **everything).rank.unreduced == max(
        u.unreduced_bytes for u in plan(ranks=4, **everything).units
    )


def test_carried_memory_is_what_a_model_carries():
    chosen = settings(carry_state=True, batch_size=3, num_microbatches=2)
    planned = planning.plan(chosen, default_registry(), ranks=1)
    with start("cpu", None) as runtime:
        built = build(chosen, runtime.mesh, runtime.device)
        codes = torch.zeros(3, 1 + built.model.n_q, 6, dtype=torch.int64)
        with MOSHI_HOST.carry(built.model) as carried:
            built.model.forward_text(codes)
    one_batch = sum(states.num_bytes(state) for state in carried.blocks.values())
    assert planned.rank.carried == 2 * 2 * one_batch  # two micro-batches, before the step and after it
    assert planned.state_bytes * planned.carried_rows == 2 * one_batch
    assert plan(batch_size=3).rank.carried == 0


@pytest.mark.parametrize(
    ("changes", "layers"),
    [
        ({}, 3),
        ({"ttt": [{"variant": "ttt_linear", "layers": "3"}]}, 1),
        ({"lora": LORA}, 4),
        ({"full_finetuning": True}, 4),
    ],
)
def test_inputs_of_the_layers_that_gradients_reach(changes, layers):
    planned = plan(batch_size=2, duration_sec=1.0, **changes)
    assert planned.kept_layers == layers
    assert planned.layer_input_bytes == layers * 2 * math.ceil(12.5) * 256 * 4


@pytest.mark.exhaustive  # a step is made for it; what needs none is counted above
@pytest.mark.first_by_default
@pytest.mark.parametrize("ranks", [2, 1])
def test_activations_are_counted_beside_gradients(ranks):
    chosen = settings(duration_sec=1.0, batch_size=2, full_finetuning=True)
    planned = planning.plan(chosen, default_registry(), ranks=ranks, activations=True)
    more = planning.plan(
        settings(duration_sec=1.0, batch_size=4, full_finetuning=True),
        default_registry(),
        ranks=ranks,
        activations=True,
    )
    assert planned.rank.activations is not None
    assert more.rank.activations is not None
    added = more.rank.activations - planned.rank.activations
    if ranks == 1:  # the peak is where the whole gradients are there, and hardly any activation is left
        assert added >= 0
    else:
        assert added > planned.layer_input_bytes, "twice the rows, twice the inputs of layers at least"
    assert planned.rank.total == more.rank.total
    assert "peak" in said(planned)


def test_copies_of_the_model_hold_as_much_as_one():
    copies, one = plan(ranks=6, shard_size=2), plan(ranks=2)
    assert (copies.ranks, copies.shards) == (6, 2)
    assert copies.rank == one.rank
    assert "of 6: 3 copies of the model, each on 2" in said(copies)
    with pytest.raises(ConfigError, match="shard_size is 4, and 6 ranks are no multiple of it"):
        plan(ranks=6, shard_size=4)
    with pytest.raises(ConfigError, match="shard_size is 4, and 2 ranks"):
        plan(ranks=2, shard_size=4)


def test_what_a_run_refuses_a_plan_refuses_too(tmp_path):
    with pytest.raises(ConfigError, match="save_adapters"):
        plan(lora={**LORA, "ft_embed": True})
    with pytest.raises(HostError, match=r"config\.json"):
        plan(moshi_paths={"hf_repo_id": str(tmp_path)})


def test_a_plan_is_plain_values():
    planned = plan(ranks=2, carry_state=True)
    assert not dist.is_initialized()
    restored = json.loads(json.dumps(asdict(planned)))
    assert restored["rank"]["parameters"] == planned.rank.parameters
    assert restored["rank"].pop("activations") is None
    assert planned.rank.total == sum(restored["rank"].values())
    assert [group["name"] for group in restored["groups"]] == ["ttt", "gates", "frozen"]


@pytest.fixture(scope="module")
def plans_7b() -> dict[int, TrainingPlan]:
    """TTT-MLP in the last three layers of the published architecture, by the number of ranks."""
    chosen = settings(
        moshi_paths={"hf_repo_id": "builtin:moshi-7b"}, param_dtype="bfloat16",
        ttt=[{"variant": "ttt_mlp", "layers": "29,30,31"}],
    )  # fmt: skip
    built = skeleton(chosen, default_registry())
    return {ranks: planning.plan_model(built, chosen, ranks=ranks, shards=ranks) for ranks in (1, 2, 4, 7, 8, 64)}


@pytest.mark.exhaustive  # seconds of 7B shapes; small ones are counted above
def test_what_is_trained_in_7b(plans_7b):
    found = {group.name: group for group in plans_7b[8].groups}
    assert (found["frozen"].parameters, found["frozen"].stored_as) == (BASE_7B, "bfloat16")
    assert found["ttt"].parameters + found["gates"].parameters == BLOCKS_7B
    assert found["ttt"].stored_as == found["gates"].stored_as == "float32"
    assert len(plans_7b[8].units) == 3 + 32 + 6 + 1
    alone = plans_7b[1].rank
    assert alone.parameters == 2 * BASE_7B + 4 * BLOCKS_7B
    assert alone.moments == 2 * alone.gradients == 8 * BLOCKS_7B


@pytest.mark.exhaustive  # the same
def test_more_ranks_need_less_of_7b(plans_7b):
    totals = [plans_7b[ranks].rank.total for ranks in sorted(plans_7b)]
    assert totals == sorted(set(totals), reverse=True)
    alone = plans_7b[1].rank
    for ranks, planned in plans_7b.items():
        # A little more than its share: gains of norms have one row, which the first rank has.
        assert alone.parameters <= planned.rank.parameters * ranks < alone.parameters * 1.01
        assert planned.rank.gathered == alone.gathered


@pytest.mark.exhaustive  # the same
def test_three_layers_of_7b_keep_their_input(plans_7b):
    assert (plans_7b[8].kept_layers, plans_7b[8].layer_input_bytes) == (3, 3 * 125 * 4096 * 2)


def test_the_command(cli, tmp_path):
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values(shard_size=2, duration_sec=1.0)))
    shown = cli("train", "run.yaml", "--plan", "--ranks", 4, "carry_state=true")
    assert shown.exit_code == 0, shown.said
    for expected in (
        "builtin:tiny: what is trained", "of 4: 2 copies of the model, each on 2", "AdamW moments",
        "carried memory", "total before activations", "activations", "peak", "Not in the peak:",
        "layers.1.sequence (ttt_linear)",
    ):  # fmt: skip
        assert expected in shown.said
    refused = cli("train", "run.yaml", "--plan", "--ranks", 3)
    assert refused.exit_code == 2
    assert "Error: shard_size is 2, and 3 ranks are no multiple of it." in refused.said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("variant", ["ttt_linear", "ttt_ridge", "gating_mlp"])
def test_a_step_in_cpp_does_not_keep_carried_memory_from_being_planned(variant):
    """The plan has states without values, which no step computes with."""
    named, free = (
        settings(ttt=[{"variant": variant, "layers": "1", "chunk": 4, **backend}], carry_state=True)
        for backend in ({"backend": {"step": "cpp"}}, {})
    )
    plans = [planning.plan(each, default_registry(), ranks=1, activations=True) for each in (named, free)]
    assert plans[0].rank == plans[1].rank
    assert plans[0].rank.activations
