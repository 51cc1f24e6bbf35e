"""One of two ranks of test_gathering.py: what gathering an adapter holds at most, and what it keeps."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

os.environ.setdefault("NO_TORCH_COMPILE", "1")

import torch
import torch.distributed as dist

from moshi_ttt import default_registry, inject, parse_config
from moshi_ttt.core.adapter import collect_adapter, load_adapter
from moshi_ttt.core.device_log import DeviceLog
from moshi_ttt.core.errors import AdapterError
from moshi_ttt.core.precision import FP32_STATE
from moshi_ttt.core.sharding import shard
from moshi_ttt.hosts.moshi.host import MOSHI_HOST


def main(out: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    entry = {"variant": "ttt_mlp", "layers": "1,2,3", "chunk": 8}
    host = {"name": "moshi", "hf_repo": "builtin:tiny", "dtype": "float32"}
    config = parse_config({"host": host, "ttt": [entry]}, registry=default_registry())
    injection = inject(MOSHI_HOST.load(config.host), config)
    tensors = {name: parameter.detach().clone() for name, parameter in injection.named_parameters()}
    shard(MOSHI_HOST, injection.model, FP32_STATE.roles(torch.float32))
    found: dict[str, object] = {
        "total": sum(tensor.nbytes for tensor in tensors.values()),
        "largest": max(tensor.nbytes for tensor in tensors.values()),
    }
    for name, keep in (("all", True), ("one", rank == 0)):
        with DeviceLog("cpu") as allocated:
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
