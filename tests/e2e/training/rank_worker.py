"""One rank of the runs in test_ranks.py: every config it is given, one after the other."""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ.setdefault("NO_TORCH_COMPILE", "1")

import torch
import torch.distributed as dist
import yaml
from rich.console import Console

from moshi_ttt import default_registry
from moshi_ttt.configs.settings import parse_settings
from moshi_ttt.training.run import run


def main(configs: list[str]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    registry = default_registry()
    for config in configs:
        values = yaml.safe_load(Path(config).read_text())
        run(parse_settings(values, registry=registry, where=config), registry, Console(quiet=True))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
