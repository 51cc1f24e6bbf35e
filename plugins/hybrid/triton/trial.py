"""Whether the kernels compute on this GPU what tensor operations compute: tried at first use, and kept on disk.

The tests run every kernel in Triton's interpreter, and compile it for three architectures. What a GPU computes can
differ from both. So ``auto`` takes the kernels where a small layer, two heads wide, has agreed with tensor operations
in float64 on that very kind of GPU. Kernels of a training call are tried at a block's first one, those of a step when
its first stream's state is allocated. It costs their compilation and some hundred launches.

Agreement is kept as a file in the user's cache folder, which appears whole or not at all. Where the results differ, or
a kernel fails, ``auto`` takes tensor operations in this process and a warning says why; the next process tries again.

A trial has the layer's options, the model's dtype, rows that stand still or are not updated, calls that start a
sequence and calls that continue one. It has not the model's width, its number of heads and rows, nor long sequences.

Shape legend: B rows, T tokens, D width, C tokens a chunk.
"""

from __future__ import annotations

import hashlib
import json
import math
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from moshi_ttt.core.atomic import atomic_file
from moshi_ttt.core.block import BlockContext, Site, SiteInfo, SiteKind
from moshi_ttt.core.errors import MoshiTTTError
from moshi_ttt.core.format import SequenceFormat
from moshi_ttt.core.precision import FP32_STATE
from moshi_ttt.plugins.common.backends import log_once, logger
from moshi_ttt.plugins.common.native import cache_folder
from moshi_ttt.plugins.hybrid.triton.tuning import sources

if TYPE_CHECKING:
    from moshi_ttt.plugins.hybrid.backends import HybridUse
    from moshi_ttt.plugins.hybrid.with_backends import HybridWithBackends

OUTPUT_LIMIT, GRADIENT_LIMIT = 1e-5, 1e-4
"""Of the difference from float64, over the norm of what float64 gives."""
TF32_LIMIT = 1e-2
"""Of both, where the policy asks for products in tf32, whose numbers have 10 bits."""
ROUNDING = 2.0**-7
"""By how much more than tensor operations the kernels may differ in a bfloat16 or float16 model: two roundings."""
HEADS, ROWS = 2, 2
IMPERCEPTIBLE = 1e-9
"""The norm below which what float64 gives is zero but for rounding: the kernels' has to be below its root."""
OPEN = 0.3
"""The initial gate of a trial's blocks: one that is closed, and stays so, would hide what is behind it."""

TrialOf = Literal["train", "step"]


@dataclass(frozen=True, kw_only=True)
class TriedKernels:
    """What a trial is of: a GPU, versions, a hash of the kernels' sources, and a layer with its options."""

    operation: TrialOf
    gpu: str
    torch: str
    triton: str
    sources: str
    layer: str
    options: str
    head_width: int
    model: str
    matmul_precision: str

    def file(self, folder: Path) -> Path:
        named = json.dumps(asdict(self), sort_keys=True)
        return folder / f"{hashlib.sha256(named.encode()).hexdigest()[:20]}.json"


_FOUND: dict[TriedKernels, str | None] = {}
"""Of what is known in this process, the reason why ``auto`` passes it by; None where it agreed, now or earlier."""


def not_agreed(use: HybridUse, operation: TrialOf, *, folder: Path | None = None) -> str | None:
    """Why ``auto`` passes the kernels by, as the end of a sentence: they differ on this GPU, or fail. None: they agree.

    Tries them where that is not known yet.

    Args:
        use: of a block, on a device where the kernels can run.
        operation: what the kernels compute, a training call or a streamed step.
        folder: of the files; None: the user's cache folder (XDG_CACHE_HOME moves it).
    """
    if use.layer is None:
        return "it is no block, which the kernels could be tried with; ask for them by name"
    tried = _tried(use, operation)
    if tried in _FOUND:
        return _FOUND[tried]
    file = tried.file(cache_folder() / "triton-trials" if folder is None else folder)
    if _is_kept(file, tried):
        _FOUND[tried] = None
        return None
    if use.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return "a graph is being captured, and the kernels were not tried on this GPU before"
    try:
        found = differences(use, operation)
    except torch.OutOfMemoryError:
        return f"there is no memory on {tried.gpu} to try its kernels in"
    except _failures() as error:
        reason = f"its kernels failed when they were tried on {tried.gpu}: {type(error).__name__}: {error}"
    else:
        limits = limits_of(use, operation)
        worse = [f"{name} by {value:.1e} (allowed {limits[name]:.0e})" for name, value in found.items()
                 if not value <= limits[name]]  # fmt: skip
        if not worse:
            _FOUND[tried] = None
            _keep(file, tried, found)
            return None
        reason = f"its kernels differ from tensor operations on {tried.gpu}: {', '.join(worse)}"
    logger.warning("Tensor operations compute %s of %s: %s. Please report it.", operation, tried.layer, reason)
    _FOUND[tried] = reason
    return reason


def _failures() -> tuple[type[Exception], ...]:
    """What kernels that do not work here raise: of Triton, of its C compiler, of the driver."""
    from triton.errors import TritonError

    return RuntimeError, TritonError, OSError, subprocess.SubprocessError, MoshiTTTError


def limits_of(use: HybridUse, operation: TrialOf) -> dict[str, float]:
    """The most that each of ``differences`` may be."""
    other = _other(operation)
    given = {"output": OUTPUT_LIMIT, other: GRADIENT_LIMIT if operation == "train" else OUTPUT_LIMIT}
    if use.matmul_precision != "highest":
        given = dict.fromkeys(given, TF32_LIMIT)
    if use.model is not torch.float32:
        given |= {f"{name}, {str(use.model)[6:]}": ROUNDING for name in ("output", other)}
    return given


def differences(use: HybridUse, operation: TrialOf) -> dict[str, float]:
    """By how much the kernels differ from float64: the largest of outputs, and of gradients or parts of the state.

    A difference is its norm over the norm of what float64 gives. In a model that is not float32 they are compared in
    its dtype too: by how much more they differ than tensor operations do. The blocks have 2 heads and 2 rows.
    """
    with _apart(use.device):
        found = _differing(use, operation, "triton", torch.float32)
        if use.model is not torch.float32:
            ours, theirs = (_differing(use, operation, name, use.model) for name in ("triton", "torch"))
            found |= {f"{name}, {str(use.model)[6:]}": ours[name] - theirs[name] for name in ours}
    return found


def _other(operation: TrialOf) -> str:
    """What is compared beside the output."""
    return "gradient" if operation == "train" else "state"


def _differing(use: HybridUse, operation: TrialOf, backend: str, dtype: torch.dtype) -> dict[str, float]:
    run, other = (_trained if operation == "train" else _streamed), _other(operation)
    block, definition = _block(use, operation, backend, dtype), _block(use, operation, "torch", torch.float64)
    definition.load_state_dict(block.state_dict())
    found = {"output": 0.0, other: 0.0}
    for ours, theirs in zip(run(block, dtype), run(definition, dtype), strict=True):
        found["output"] = max(found["output"], _difference(ours[0], theirs[0]))
        others = (_difference(*pair) for pair in zip(ours[1:], theirs[1:], strict=True))
        found[other] = max(found[other], *others)
    return found


def _block(use: HybridUse, operation: TrialOf, backend: str, dtype: torch.dtype) -> HybridWithBackends:
    """A small block of the layer of ``use``, with every parameter drawn: no term is zero by chance."""
    assert use.layer is not None
    info = SiteInfo(
        site=Site(0, SiteKind.SEQUENCE), dim=HEADS * use.widths[0], num_heads=HEADS, device=use.device, dtype=dtype,
        format=SequenceFormat(),
    )  # fmt: skip
    changes = {"train": "torch", "step": "torch", "tune": False, operation: backend}
    config = use.config.model_copy(
        update={
            "backend": use.config.backends().model_copy(update=changes),
            "gate": use.config.gate.model_copy(update={"init": OPEN}),
        }
    )
    roles = replace(FP32_STATE.roles(dtype), matmul_precision=use.matmul_precision)
    block = use.layer(config, info, roles)
    generator = torch.Generator().manual_seed(0)
    block.reset_parameters(generator)
    with torch.no_grad():
        for name, parameter in block.named_parameters():
            noise = 0.2 * torch.randn(parameter.shape, generator=generator).to(parameter)
            # A token's scale is 1 / position and its offset, and 0 below that, which would hide the chunk's update.
            parameter.add_(noise.abs() if name == "token_scale_offset" else noise)
    return block


def _drawn(block: HybridWithBackends, tokens: int, seed: int, through: torch.dtype) -> Tensor:
    """``[B, T, D]``, the same numbers in every block; ``through`` is the dtype that they are rounded to."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(ROWS, tokens, block.info.dim, generator=generator)
    return drawn.to(through).to(block.info.device, block.info.dtype)


def _trained(block: HybridWithBackends, through: torch.dtype) -> Iterator[list[Tensor]]:
    """The output and every gradient: of a call, and of two calls, the state between them cut from the graph or not."""
    size = block.config.chunk
    carried = [size + 3, 2 * size + 2]
    calls = [([2 * size + 3], BlockContext(want_state=False))]
    if block.causal:
        calls += [(carried, BlockContext(detach_state=True)), (carried, BlockContext())]
    for cuts, given in calls:
        x = _drawn(block, sum(cuts), 1, through).requires_grad_()
        block.zero_grad()
        state, outputs = None, []
        for part in x.split(cuts, 1):
            context = replace(given, input_embeddings=part.detach().flip(-1))
            y, state = block(part, state or None, context)
            outputs.append(y)
        output = torch.cat(outputs, 1)
        (output * _drawn(block, sum(cuts), 2, through)).sum().backward()
        learned = [torch.zeros_like(each) if each.grad is None else each.grad for each in (x, *block.parameters())]
        yield [output.detach(), *learned]


@torch.no_grad()
def _streamed(block: HybridWithBackends, through: torch.dtype) -> Iterator[list[Tensor]]:
    """The outputs and the state of a stream over the end of a chunk.

    Its second row stands still for two tokens, its first is not updated by one; the last tokens have no masks.
    """
    steps = block.config.chunk + 4
    x, state, outputs = _drawn(block, steps, 1, through), block.allocate_state(ROWS), []
    for t in range(steps):
        token = x[:, t : t + 1]
        context = BlockContext(input_embeddings=token.flip(-1))
        active = torch.tensor([True, t not in (1, 2)], device=x.device)
        if t < steps - 2:
            updates = torch.tensor([t != 3, True], device=x.device)
            context = replace(context, exec_mask=active, updates=updates)
        y = block.step(token, state, context)
        outputs.append(torch.where(active[:, None, None], y, 0))  # [B] over [B, 1, D]
    yield [torch.cat(outputs, 1), *state.values()]


def _difference(found: Tensor, expected: Tensor) -> float:
    """The norm of the difference over that of ``expected``; inf where a number is not finite, or counters differ."""
    if not expected.is_floating_point():
        return 0.0 if torch.equal(found, expected) else math.inf
    found, norm = found.double(), float(expected.norm())
    if not bool(found.isfinite().all()):
        return math.inf
    if norm < IMPERCEPTIBLE:
        return 0.0 if float(found.norm()) < IMPERCEPTIBLE**0.5 else math.inf
    return float((found - expected).norm()) / norm


@contextmanager
def _apart(device: torch.device) -> Iterator[None]:
    """Apart from the call that asks: its modes, autograd hooks and autocast. Generators are then as they were."""
    with ExitStack() as stack:
        stack.enter_context(_disable_current_modes())
        stack.enter_context(torch.device("cpu"))  # where numbers are drawn, whatever the default device is
        stack.enter_context(torch.random.fork_rng([device] if device.type == "cuda" else []))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.autocast(device.type, enabled=False))
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(_same, _same))
        yield


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _tried(use: HybridUse, operation: TrialOf) -> TriedKernels:
    import triton

    assert use.layer is not None
    options = use.config.model_dump(mode="json", exclude={"backend", "layers"})
    gpu = torch.cuda.get_device_name(use.device) if use.device.type == "cuda" else str(use.device)
    return TriedKernels(
        operation=operation, gpu=gpu, torch=torch.__version__, triton=triton.__version__, sources=sources(),
        layer=f"{use.layer.__module__}.{use.layer.__qualname__}", options=json.dumps(options, sort_keys=True),
        head_width=use.widths[0], model=str(use.model), matmul_precision=use.matmul_precision,
    )  # fmt: skip


def _is_kept(file: Path, tried: TriedKernels) -> bool:
    try:
        return bool(json.loads(file.read_text(encoding="utf-8"))["tried"] == asdict(tried))
    except FileNotFoundError:
        return False
    except (OSError, ValueError, KeyError, TypeError) as error:
        log_once(f"{file} is ignored, and the kernels are tried again: {type(error).__name__}: {error}")
        return False


def _keep(file: Path, tried: TriedKernels, found: Mapping[str, float]) -> None:
    text = json.dumps({"tried": asdict(tried), "differences": dict(found)}, indent=1)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(file) as written:
            written.write_text(text, encoding="utf-8")
    except OSError as error:
        log_once(f"that the kernels agree cannot be kept: {error}; the next process tries them again")
