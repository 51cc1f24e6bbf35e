"""Run by test_compiling.py in a process where Moshi may compile: argument 1 says which case."""

from __future__ import annotations

import contextlib
import sys
import tempfile
import warnings
from pathlib import Path

import torch


def refuse(*arguments, **named):
    raise AssertionError(f"torch.compile was called on the CPU, for {arguments}")


def computes_without_compiling() -> None:
    """Load, plan from meta, evaluate, train, stream, take the loss; ``torch.compile`` must not be called."""
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
                inject(model, config).initialize()
            model(codes)
            MOSHI_HOST.synthetic_loss(model.train(), batch_size=1, length=9, seed=0).backward()
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
        code = None
        try:
            main()
        except SystemExit as end:
            code = end.code
        assert not code, code


class Rounding:
    """Stands for ``torch.compile`` where no compiler is: the activation of the MLP stays in float32, as inductor's."""

    def __init__(self, function):
        self.function = function

    def __call__(self, *arguments):
        if self.function.__name__ != "gating_forward_kernel":
            return self.function(*arguments)
        weight_in, weight_out, activation, x = arguments
        gate, up = torch.nn.functional.linear(x, weight_in).float().unflatten(-1, (2, -1)).unbind(-2)
        return torch.nn.functional.linear((activation(gate) * up).to(x), weight_out)


def logits(model, codes, *, training=False, compiled=True):
    """Of one forward pass, and of streaming by an LMGen's own calls: ``[B, T, V]`` twice."""
    from moshi_ttt.hosts.moshi.upstream import compiling

    with contextlib.nullcontext() if compiled else compiling.no_compile():
        whole = model.train(training).forward_text(codes)[1].detach()
        with torch.no_grad(), model.eval().streaming(codes.shape[0]):
            streamed = torch.cat([model.forward_text(token)[1] for token in codes.split(1, dim=-1)], dim=2)
    return whole, streamed


def starts_at_the_base() -> None:
    """At step 0 ``gating_mlp`` is bit-equal to the base as it computes, compiled or not, trained W_0 and LoRA too."""
    from moshi.modules import transformer

    from moshi_ttt import default_registry, inject, parse_config
    from moshi_ttt.hosts.moshi.loading import resolve_repo

    # On the CPU Moshi's layers turn compiling off. On CUDA they do not: that is what is looked at here.
    transformer.no_compile = contextlib.nullcontext
    codes = torch.randint(0, 128, (2, 17, 9), generator=torch.Generator().manual_seed(0))
    for dtype in (torch.bfloat16, torch.float32):
        base = resolve_repo("builtin:tiny").load_lm(dtype=dtype)
        shown = False
        for options in ({}, {"train_w_down": True}):
            entry = {"variant": "gating_mlp", "layers": "all", "chunk": 4, **options}
            host = {"name": "moshi", "hf_repo": "builtin:tiny"}
            model = resolve_repo("builtin:tiny").load_lm(dtype=dtype)
            inject(model, parse_config({"host": host, "ttt": [entry]}, registry=default_registry()))
            for training in (False, True):
                for compiled in (True, False):
                    given = logits(model, codes, training=training, compiled=compiled)
                    expected = logits(base, codes, training=training, compiled=compiled)
                    for what, one, other in zip(("whole", "streamed"), given, expected, strict=True):
                        error = (one.float() - other.float()).abs().max()
                        assert torch.equal(one, other), (dtype, options, training, compiled, what, error)
            one, other = logits(base, codes)[0], logits(base, codes, compiled=False)[0]
            shown = shown or not torch.equal(one, other)
        print(dtype, "compiled and not differ by", float((one.float() - other.float()).abs().max()))
        assert shown or dtype is torch.float32, "compiling changes nothing here, so this shows nothing"


def starts_at_the_base_without_a_compiler() -> None:
    torch.compile = Rounding
    starts_at_the_base()


CASES = {
    case.__name__: case
    for case in (computes_without_compiling, starts_at_the_base, starts_at_the_base_without_a_compiler)
}

if __name__ == "__main__":
    warnings.simplefilter("ignore")
    CASES[sys.argv[1]]()
    print("done")
