"""Parts of sharded tensors put back in their places, on two ranks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from moshi_ttt.core.sharding import assign, placed_like, whole
from tests.ranks import launch

WORKER = Path(__file__).parent / "sharding_worker.py"


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("sharding")
    launch(WORKER, folder)
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]


def test_what_ranks_compute_of_their_heads_is_whole_again(ranks):
    for rank in ranks:
        assert rank["shape"] == [6, 4, 4]
        assert rank["placements"] == "(Shard(dim=0),)"
        assert rank["equal"] is True
        assert rank["replicated"] is True
        assert rank["uneven"] == [1.0, 1.0, 1.0, 2.0, 2.0]
        assert rank["assigned"] is True


def test_gradients_flow_through(ranks):
    assert all(rank["gradient"] < 1e-5 for rank in ranks)


def test_the_whole_in_place_of_a_part_is_refused(ranks):
    for rank in ranks:
        assert "part has shape (3, 4, 4), got a tensor of shape (6, 4, 4)" in rank["refused"]


def test_a_tensor_that_is_not_sharded_is_itself():
    tensor, made = torch.zeros(2, 3), torch.ones(2, 3)
    assert placed_like(tensor, made) is made
    assert whole(made) is made
    assign(tensor, made)
    assert torch.equal(tensor, made)
    with pytest.raises(ValueError, match="shape"):
        placed_like(tensor, torch.ones(3, 2))
