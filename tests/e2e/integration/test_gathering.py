"""Of a sharded model, the rank that writes an adapter keeps its tensors; the others hold one at a time."""

from __future__ import annotations

import json
from pathlib import Path

from tests.ranks import launch

WORKER = Path(__file__).parent / "gather_worker.py"


def test_only_the_rank_that_writes_keeps_what_is_gathered(tmp_path):
    launch(WORKER, tmp_path)
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2))
    total, largest = first["total"], first["largest"]
    print(first, second)
    assert largest < total / 8
    assert first["one"]["kept"] == first["all"]["kept"] == second["all"]["kept"] == total
    assert total <= first["one"]["peak"] <= total + 4 * largest
    assert second["all"]["peak"] >= total
    assert second["one"]["kept"] == 0
    assert second["one"]["peak"] <= 4 * largest  # what a gather itself needs: this rank's part, the parts, the whole
    assert "refused" not in first
    assert "kept none of its tensors (keep=False). Write it on the rank that kept them" in second["refused"]
    assert (tmp_path / "adapter" / "adapter.safetensors").is_file()
