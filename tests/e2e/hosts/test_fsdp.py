"""Two ranks against one process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from moshi_ttt.core.errors import HostError
from moshi_ttt.core.precision import FP32_STATE
from moshi_ttt.core.sharding import shard
from moshi_ttt.hosts.moshi import fsdp
from moshi_ttt.hosts.moshi.host import MOSHI_HOST
from moshi_ttt.hosts.moshi.tiny import random_tiny_lm
from tests.ranks import launch
from tests.unit.hosts.toy import toy_lm

from . import fsdp_worker

WORKER = Path(__file__).parent / "fsdp_worker.py"


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("fsdp")
    launch(WORKER, folder)
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]


@pytest.fixture(scope="module")
def alone() -> dict:
    model = fsdp_worker.build()
    losses, dtypes = fsdp_worker.train(model, list(range(fsdp_worker.ROWS)))
    return fsdp_worker.report(model, losses, dtypes)


def test_losses_equal_one_process(ranks, alone):
    # The first step is the same arithmetic on both sides. After it, parameters differ by the order of adding two
    # gradients (float32 rounding, which AdamW with eps 1e-6 does not blow up); a bfloat16 activation rarely flips.
    sharded = torch.tensor([ranks[0]["losses"], ranks[1]["losses"]]).transpose(0, 1).flatten(1)
    reference = torch.tensor(alone["losses"])
    assert torch.equal(sharded[0], reference[0])
    torch.testing.assert_close(sharded, reference, rtol=1e-4, atol=0)
    assert not torch.equal(reference[0], reference[-1])


def test_parameters_equal_one_process_on_every_rank(ranks, alone):
    assert ranks[0]["final"] == ranks[1]["final"]
    for name, values in alone["final"].items():
        torch.testing.assert_close(
            torch.tensor(ranks[0]["final"][name]), torch.tensor(values), rtol=1e-4, atol=1e-5, msg=name
        )


def test_trained_base_parameters_outside_the_layers_get_their_gradients(ranks):
    # Two bfloat16 gradients, added in float32 by the ranks and in bfloat16 by the reference: one rounding apart.
    for name, values in fsdp_worker.root_gradients(False, [0, 1]).items():
        reference, sharded = torch.tensor(values), torch.tensor(ranks[0]["root_gradients"][name])
        assert reference.abs().max() > 0
        torch.testing.assert_close(sharded, reference, rtol=0, atol=2**-7 * float(reference.abs().max()), msg=name)


def test_dtypes_on_every_rank(ranks):
    for rank in ranks:
        assert rank["seen_dtypes"] == rank["carried_dtypes"] == rank["stored"] == ["torch.float32"]


def test_everything_is_sharded_and_nothing_lost(ranks, alone):
    for rank in ranks:
        assert rank["placed"] == ["DTensor"]
        assert rank["parameters"] == alone["parameters"]
        assert rank["frozen_gradients"] == 0
        assert rank["digest"] == MOSHI_HOST.fingerprint(fsdp_worker.build())["weights"]


def test_a_sharded_model_refuses_what_it_cannot_do(ranks):
    for rank in ranks:
        assert "cannot stream" in rank["refusals"]["stream"]
        assert "before sharding" in rank["refusals"]["detach"]
        assert "sharded already" in rank["refusals"]["shard"]
        assert "missing" in rank["refusals"]["load_base"]


def test_units_are_innermost_first():
    model = toy_lm((1,))
    units = MOSHI_HOST.fsdp_units(model)
    assert units[0] is model.transformer.layers[1].ttt.block
    assert units[-1] is model
    assert len(units) == 1 + 3 + 1 + 1
    seen: set[int] = set()
    for unit in units:
        inside = {id(module) for module in unit.modules()} - {id(unit)}
        later = {id(other) for other in units} - seen - {id(unit)}
        assert not inside & later
        seen.add(id(unit))


def test_shard_without_a_process_group_raises():
    with pytest.raises(HostError, match="process group"):
        shard(MOSHI_HOST, random_tiny_lm(), FP32_STATE.roles(torch.float32))
    with pytest.raises(HostError, match="LMModel"):
        shard(MOSHI_HOST, torch.nn.Linear(2, 2), FP32_STATE.roles(torch.float32))


def test_the_earlier_name_works_with_a_warning():
    with pytest.warns(DeprecationWarning, match="core.sharding.shard"), pytest.raises(HostError, match="process group"):
        fsdp.shard(random_tiny_lm(), FP32_STATE.roles(torch.float32))
