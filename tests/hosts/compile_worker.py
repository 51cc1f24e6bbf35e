"""Run by test_compiling.py in a process where Moshi may compile: argument 1 says which case."""

from __future__ import annotations

import sys
import tempfile
import warnings
from pathlib import Path

import torch


def refuse(*arguments, **named):
    raise AssertionError(f"torch.compile was called on the CPU, for {arguments}")


def computes_without_compiling() -> None:
    """Load, plan from meta, evaluate, train, stream and probe; ``torch.compile`` must not be called."""
    torch.compile = refuse
    from moshi.modules.transformer import _rms_norm

    assert hasattr(_rms_norm, "__wrapped__"), "Moshi does not compile in this process, so it shows nothing"
    from moshi_ttt import default_registry, inject, parse_config
    from moshi_ttt.apps.cli import main
    from moshi_ttt.hosts.moshi.host import MOSHI_HOST
    from moshi_ttt.hosts.moshi.loading import resolve_repo
    from moshi_ttt.hosts.moshi.upstream import LMGen

    entries = [{"variant": "gating_mlp", "layers": "0", "chunk": 4}, {"variant": "ttt_mlp", "layers": "1", "chunk": 4}]
    host = {"name": "moshi", "hf_repo": "builtin:tiny"}
    config = parse_config({"host": host, "ttt": entries}, registry=default_registry())
    codes = torch.zeros(1, 17, 9, dtype=torch.int64)
    weights = MOSHI_HOST.base_state_dict(MOSHI_HOST.load(config.host))
    for model in (MOSHI_HOST.load(config.host), MOSHI_HOST.skeleton(config.host).to_empty(device="cpu")):
        MOSHI_HOST.load_base(model, weights)
        for blocks in (False, True):
            if blocks:
                inject(model, config).initialise()
            model(codes)
            MOSHI_HOST.probe(model.train(), batch_size=1, length=9, seed=0).backward()
            generator = LMGen(model.eval(), use_sampling=False)
            with torch.no_grad(), generator.streaming(1):
                for _ in range(4):
                    generator.step(torch.zeros(1, 8, 1, dtype=torch.int64))
    mimi = resolve_repo("builtin:tiny").load_mimi()
    with torch.no_grad():
        mimi.decode(mimi.encode(torch.zeros(1, 1, 4 * 1920)))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "config.yaml")
        path.write_text("host: {name: moshi, hf_repo: 'builtin:tiny'}\nttt: [{variant: gating_mlp, layers: '0'}]\n")
        sys.argv = ["moshi-ttt", "doctor", str(path)]
        try:
            main()
        except SystemExit as end:
            assert not end.code, end.code


CASES = {case.__name__: case for case in (computes_without_compiling,)}

if __name__ == "__main__":
    warnings.simplefilter("ignore")
    CASES[sys.argv[1]]()
    print("done")
