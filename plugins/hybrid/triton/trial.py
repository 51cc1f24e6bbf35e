"""Whether the kernels compute on this GPU what tensor operations compute: tried at first use, and kept on disk.

The tests run every kernel in Triton's interpreter, and compile it for three architectures. What a GPU computes can
differ from both. So ``auto`` takes the kernels where a small layer, two heads wide, has agreed with tensor operations
in float64 on that very kind of GPU. The first use costs the compilation of the kernels and some hundred launches.

Agreement alone is kept: in the process, and as a file in the user's cache folder, which appears whole or not at all.
Where the results differ, or a kernel fails, ``auto`` takes tensor operations and says why, and the next block tries
again.

Shape legend: B rows, T tokens, D width, C tokens a chunk.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from moshi_ttt.core.atomic import atomic_file
from moshi_ttt.core.block import BlockContext, Site, SiteInfo, SiteKind
from moshi_ttt.core.format import SequenceFormat
from moshi_ttt.core.precision import FP32_STATE
from moshi_ttt.plugins.common.backends import log_once
from moshi_ttt.plugins.common.native import cache_folder
from moshi_ttt.plugins.hybrid.triton.tuning import sources

if TYPE_CHECKING:
    from moshi_ttt.plugins.hybrid.backends import HybridUse
    from moshi_ttt.plugins.hybrid.with_backends import HybridWithBackends

OUTPUT_LIMIT, GRADIENT_LIMIT = 1e-5, 1e-4
"""Of the difference from float64, over the norm of what float64 gives."""
TF32_LIMIT = 1e-2
"""Of both, where the policy asks for products in tf32, whose numbers have 10 bits."""
HEADS, ROWS = 2, 2
IMPERCEPTIBLE = 1e-9
"""The norm below which a gradient is zero but for rounding, and is not compared."""

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
    matmul_precision: str

    def file(self, folder: Path) -> Path:
        named = json.dumps(asdict(self), sort_keys=True)
        return folder / f"{hashlib.sha256(named.encode()).hexdigest()[:20]}.json"


_AGREED: set[TriedKernels] = set()
"""What has agreed in this process, or in an earlier one."""


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
    file = tried.file(cache_folder() / "triton-trials" if folder is None else folder)
    if tried in _AGREED or _is_kept(file, tried):
        _AGREED.add(tried)
        return None
    if use.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return "a graph is being captured, and the kernels were not tried on this GPU before"
    try:
        found = differences(use, operation)
    except Exception as error:  # whatever a compiler or a driver raises: tensor operations are there
        return f"its kernels failed when they were tried on {tried.gpu}: {type(error).__name__}: {error}"
    limits = limits_of(use)
    worse = [f"{name} by {value:.1e} (allowed {limits[name]:.0e})" for name, value in found.items()
             if not value <= limits[name]]  # fmt: skip
    if worse:
        return f"its kernels differ from tensor operations on {tried.gpu}: {', '.join(worse)}; please report it"
    _AGREED.add(tried)
    _keep(file, tried, found)
    return None


def limits_of(use: HybridUse) -> dict[str, float]:
    """The most by which each of ``differences`` may be."""
    if use.matmul_precision != "highest":
        return {"output": TF32_LIMIT, "gradient": TF32_LIMIT, "state": TF32_LIMIT}
    return {"output": OUTPUT_LIMIT, "gradient": GRADIENT_LIMIT, "state": OUTPUT_LIMIT}


def differences(use: HybridUse, operation: TrialOf) -> dict[str, float]:
    """The largest of outputs, and of gradients or of parts of the state, by how much the kernels differ from float64.

    A difference is the norm of it over the norm of what float64 gives. The blocks have 2 heads and 2 rows.
    """
    run, other = (_trained, "gradient") if operation == "train" else (_streamed, "state")
    with _apart(use.device):
        kernels, definition = (
            _block(use, operation, name, dtype) for name, dtype in (("triton", torch.float32), ("torch", torch.float64))
        )
        definition.load_state_dict(kernels.state_dict())
        found = {"output": 0.0, other: 0.0}
        for ours, theirs in zip(run(kernels), run(definition), strict=True):
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
    backends = use.config.backends().model_copy(
        update={"train": "torch", "step": "torch", "tune": False, operation: backend}
    )
    roles = replace(FP32_STATE.roles(dtype), matmul_precision=use.matmul_precision)
    block = use.layer(use.config.model_copy(update={"backend": backends}), info, roles)
    generator = torch.Generator().manual_seed(0)
    block.reset_parameters(generator)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator).to(parameter))
    return block


def _drawn(block: HybridWithBackends, tokens: int, seed: int) -> Tensor:
    """``[B, T, D]``, the same numbers in every dtype."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(ROWS, tokens, block.info.dim, generator=generator).to(block.info.device, block.info.dtype)


def _trained(block: HybridWithBackends) -> Iterator[list[Tensor]]:
    """The output and every gradient of a call, and of two calls of which the second continues the first."""
    size = block.config.chunk
    calls = [[2 * size + 3], [size + 3, 2 * size + 2]]
    for cuts in calls if block.causal else calls[:1]:
        x, weights = _drawn(block, sum(cuts), 1).requires_grad_(), _drawn(block, sum(cuts), 2)
        block.zero_grad()
        state, outputs = None, []
        for part in x.split(cuts, 1):
            given = BlockContext(input_embeddings=part.detach().flip(-1), want_state=len(cuts) > 1)
            y, state = block(part, state, given)
            state = state or None
            outputs.append(y)
        output = torch.cat(outputs, 1)
        (output * weights).sum().backward()
        learned = [torch.zeros_like(each) if each.grad is None else each.grad for each in (x, *block.parameters())]
        yield [output.detach(), *learned]


def _streamed(block: HybridWithBackends) -> Iterator[list[Tensor]]:
    """The outputs and the state of a stream over the end of a chunk, whose second row stands still for two tokens."""
    steps = block.config.chunk + 3
    x, state, outputs = _drawn(block, steps, 1), block.allocate_state(ROWS), []
    for t in range(steps):
        active = torch.tensor([True, t not in (1, 2)], device=x.device)
        token = x[:, t : t + 1]
        with torch.no_grad():
            y = block.step(token, state, BlockContext(input_embeddings=token.flip(-1), exec_mask=active))
        outputs.append(torch.where(active[:, None, None], y, 0))  # [B] over [B, 1, D]
    yield [torch.cat(outputs, 1), *(part for part in state.values() if part.is_floating_point())]


def _difference(found: Tensor, expected: Tensor) -> float:
    norm = float(expected.norm())
    if norm < IMPERCEPTIBLE:
        return 0.0
    return float((found.double() - expected).norm()) / norm


@contextmanager
def _apart(device: torch.device) -> Iterator[None]:
    """Apart from the call that asks: its autograd hooks, autocast and grad mode; generators are as they were after."""
    with ExitStack() as stack:
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
        head_width=use.widths[0], matmul_precision=use.matmul_precision,
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
