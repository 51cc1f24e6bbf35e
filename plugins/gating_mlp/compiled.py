"""The compiled step: step.cpp, built on the machine that streams. The same results as recurrent.py."""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moshi_ttt.core.errors import ConfigError
from moshi_ttt.core.state import BlockState
from moshi_ttt.plugins.common.finite import largest_factor
from moshi_ttt.plugins.common.success_gate import SuccessGate
from moshi_ttt.plugins.gating_mlp.memory import Memory

NAME = "moshi_ttt_gating_mlp"
SOURCE = Path(__file__).with_name("step.cpp")
HEADER = Path(__file__).with_name("corrections.h")
DTYPES = (torch.float32, torch.float64)


OPTIONAL = ("norm", "factor", "answer", "scores")
"""Parts of the state that only some options have, in the order in which the compiled step takes them."""


class CompiledStepper:
    """Streams rows whose state is on a CPU, in float32 or float64; holds no state.

    Raises:
        ConfigError: another device or dtype, or step.cpp cannot be built here.
    """

    def __init__(self, memory: Memory, like: Tensor) -> None:
        if like.device.type != "cpu" or like.dtype not in DTYPES:
            raise ConfigError(
                f"The compiled step of gating_mlp is for a state on a CPU in float32 or float64, and this one is "
                f"{like.dtype} on {like.device}. Stream without compile_step: on CUDA a captured graph does its work."
            )
        schedule = memory.schedule
        self.decay, self.clip = memory.decay, memory.clip
        self.corrects = memory.update_rule != "hebbian"
        self.limit = largest_factor(like.dtype)
        self.plan = [
            schedule.chunk, schedule.staged, schedule.moves, schedule.slice, schedule.look_ahead, memory.first_tap,
            memory.taps,
        ]  # fmt: skip
        self.run = operation()

    def step(
        self, state: BlockState, token: tuple[Tensor, Tensor, Tensor], conv: Tensor, projection: Tensor,
        active: Tensor | None, updated: Tensor | None = None, cast: object = None, *, ridge: Tensor | None = None,
        success: SuccessGate | None = None,
    ) -> Tensor:  # fmt: skip
        """See ``Stepper.step``; what is cast here is cast in registers."""
        gate = [] if success is None else [part.to(token[0]) for part in (success.bias, success.slope, success.weights)]
        added: Tensor = self.run(
            *token, state["position"], state["delta"], state["keys"], state["values"], state["open"], state["scale"],
            state["spoiled"], state["skipped"], state["enabled"], *(state.get(name) for name in OPTIONAL),
            conv, projection, active, updated, ridge, gate, self.plan, self.decay, self.limit, self.clip, self.corrects,
        )  # fmt: skip
        return added


@functools.cache
def operation() -> Any:
    """step.cpp as an operation of torch's, from the user's cache folder or built now (10 to 30 s).

    Raises:
        ConfigError: it cannot be built.
    """
    library = _cache() / _version() / f"{NAME}.so"
    try:
        if not library.exists():
            _build(library)
        torch.ops.load_library(library)
    except OSError as error:
        raise ConfigError(
            f"The compiled step of gating_mlp cannot be built: {error}. It needs a C++ compiler, g++ or the one that "
            f"CXX names, and a folder to keep it, {library.parent} (XDG_CACHE_HOME moves it). Without compile_step the "
            "same results come from tensor operations."
        ) from error
    torch.library.register_fake(f"{NAME}::step", _shape)
    return getattr(torch.ops, NAME).step.default


def _build(library: Path) -> None:
    """Raises OSError: no compiler, it fails, or the folder cannot be written."""
    torch_folder = Path(torch.__file__).parent
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
        built = Path(scratch, library.name)
        command = [
            os.environ.get("CXX", "g++"), "-O3", "-std=c++17", "-shared", "-fPIC",
            f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
            f"-I{torch_folder / 'include'}", f"-I{HEADER.parent}", str(SOURCE), "-o", str(built),
            f"-L{torch_folder / 'lib'}", "-ltorch_cpu", "-lc10",
        ]  # fmt: skip
        result = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace")
        if result.returncode != 0:
            lines = result.stderr.strip().splitlines()
            said = next((line for line in lines if "error" in line), "it said nothing")
            raise OSError(f"{command[0]} ended with {result.returncode}: {said}")
        built.replace(library)  # whole or not at all, also when two processes build at once


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moshi-ttt"


def _version() -> str:
    """Another one for each source, torch and kind of machine."""
    sources = [path.read_text(encoding="utf-8") for path in (SOURCE, HEADER)]
    what = [*sources, torch.__version__, platform.machine()]
    return f"{NAME}-{hashlib.sha256(' '.join(what).encode()).hexdigest()[:16]}"


def _shape(key: Tensor, target: Tensor, *others: Any, **named: Any) -> Tensor:
    """A tensor like the result, for tensors without values."""
    return torch.empty_like(target)
