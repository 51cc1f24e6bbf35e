"""One of two ranks of test_gathering.py, under torchrun: what gathering an adapter holds at most, and what it keeps."""

from __future__ import annotations

import json
import os
import sys
import weakref
from pathlib import Path

os.environ.setdefault("NO_TORCH_COMPILE", "1")

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from moshi_ttt import default_registry, inject, parse_config
from moshi_ttt.core.adapter import collect_adapter, load_adapter
from moshi_ttt.core.errors import AdapterError
from moshi_ttt.core.precision import FP32_STATE
from moshi_ttt.hosts.moshi.fsdp import shard
from moshi_ttt.hosts.moshi.host import MOSHI_HOST


class Allocated(TorchDispatchMode):
    """The most bytes that the tensors made inside hold at a time, each storage once."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._alive: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        known = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if type(t) is torch.Tensor}
        for tensor in tree_leaves(out):
            if type(tensor) is torch.Tensor and tensor.untyped_storage()._cdata not in known | self._alive:
                self._add(tensor.untyped_storage())
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        self._alive.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._remove, key, size)

    def _remove(self, key: int, size: int) -> None:
        self._alive.discard(key)
        self.now -= size


def main(out: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    entry = {"variant": "ttt_mlp", "layers": "1,2,3", "chunk": 8}
    host = {"name": "moshi", "hf_repo": "builtin:tiny", "dtype": "float32"}
    config = parse_config({"host": host, "ttt": [entry]}, registry=default_registry())
    injection = inject(MOSHI_HOST.load(config.host), config)
    tensors = {name: parameter.detach().clone() for name, parameter in injection.named_parameters()}
    shard(injection.model, FP32_STATE.roles(torch.float32))
    found: dict[str, object] = {
        "total": sum(tensor.nbytes for tensor in tensors.values()),
        "largest": max(tensor.nbytes for tensor in tensors.values()),
    }
    for name, keep in (("all", True), ("one", rank == 0)):
        with Allocated() as allocated:
            contents = collect_adapter(injection, keep=keep)
            found[name] = {"peak": allocated.peak, "kept": sum(tensor.nbytes for tensor in contents.tensors.values())}
        if keep:
            assert all(torch.equal(tensor, tensors[key]) for key, tensor in contents.tensors.items())
            assert contents.tensors.keys() == tensors.keys()
    try:
        contents.write(out / "adapter")
        loaded = load_adapter(MOSHI_HOST.load(config.host), out / "adapter")
        assert all(torch.equal(parameter, tensors[name]) for name, parameter in loaded.named_parameters())
    except AdapterError as error:
        found["refused"] = str(error)
    (out / f"rank{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
