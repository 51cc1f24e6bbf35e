"""Where the backend ``triton`` of a training call can serve, and how its kernels run.

``train`` is the backend itself.
"""

from __future__ import annotations

import os
import shutil
from importlib.metadata import PackageNotFoundError, version

import torch

from moshi_ttt.core.precision import MatmulPrecision
from moshi_ttt.plugins.hybrid.triton.resources import training_too_large
from moshi_ttt.plugins.hybrid.triton.train_settings import Products

LEAST_TRITON = (3, 2)
LEAST_CAPABILITY = (8, 0)
STATES = (torch.float32, torch.bfloat16)
"""Dtypes of the state that the kernels read and write; they compute in float32 with both."""
COMPUTED = (torch.float32, torch.bfloat16)
"""Dtypes of the roles whose part the kernels compute in float32: no less precisely than the policy asks."""
CHUNKS, HEAD_WIDTHS = (16, 32, 64), (16, 32, 64, 128)
"""Tile sizes that the kernels take: powers of two from the least that a matrix product has."""
BY_AUTO = {"linear": (16, 32), "mlp": (16,), "around": (16,)}
"""Chunk sizes with which ``auto`` may take the kernels, at head widths of ``AUTO_HEAD_WIDTHS``.

What is around the inner loop takes as much with every chunk, and is recorded at one.
"""
AUTO_HEAD_WIDTHS = (64, 128)


def kind_of(widths: tuple[int, ...]) -> str | None:
    """``linear`` or ``mlp``, the kernels for a fast network of these layer widths; None where there are none."""
    return {2: "linear", 3: "mlp"}.get(len(widths))


def products_of(device: torch.device, precision: MatmulPrecision, state: torch.dtype = torch.float32) -> Products:
    """How the kernels multiply matrices: never less precisely than the policy has torch do it.

    With a state in float32, as three products of tf32 parts, and in tf32 alone where the policy asks for that; on a
    CPU, interpreted, in float32. With a state in bfloat16 the torch form multiplies in bfloat16, and so do the kernels.
    """
    if state == torch.bfloat16:
        return "bf16_interpreted" if device.type == "cpu" else "bf16"
    if device.type == "cpu":
        return "ieee"
    return "tf32x3" if precision == "highest" else "tf32"


def interpreted() -> bool:
    """Whether this process asks Triton to interpret kernels, on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def by_name_alone(device: torch.device) -> str | None:
    """Why ``auto`` takes no kernels at all where they could be had, as the end of a sentence; None where it may."""
    if device.type == "meta":
        return "on tensors without values it counts its launches; ask for it by name"
    if interpreted():
        return "Triton's interpreter is for tests; ask for it by name"
    return None


def not_here(device: torch.device) -> str | None:
    """Why kernels cannot run on a device, as the end of a sentence; None where they can.

    On the meta device they can, and compute nothing: their launches and their memory are counted there.
    """
    if device.type == "cpu" and not interpreted():
        return "its device is cpu, where Triton runs in its interpreter alone (TRITON_INTERPRET=1, for tests)"
    if device.type not in ("cpu", "cuda", "meta"):
        return f"its device is {device}; the kernels are for NVIDIA GPUs"
    try:
        found = version("triton")
    except PackageNotFoundError:
        return "Triton is not installed"
    if tuple(int(part) for part in found.split(".")[:2]) < LEAST_TRITON:
        return f"Triton is {found}, and the kernels need {'.'.join(map(str, LEAST_TRITON))} or newer"
    if device.type in ("cpu", "meta"):  # interpreted, or tensors without values, on which nothing runs
        return None
    if not torch.cuda.is_available():
        return "PyTorch finds no CUDA device"
    if torch.version.hip is not None:
        return "this is an AMD GPU; the kernels are for NVIDIA GPUs"
    if (capability := torch.cuda.get_device_capability(device)) < LEAST_CAPABILITY:
        return f"its GPU has compute capability {capability[0]}.{capability[1]}, and the kernels need 8.0 or newer"
    if not any(shutil.which(name) for name in (os.environ.get("CC", "cc"), "gcc", "clang")):
        return "Triton needs a C compiler at run time, and there is none here (CC names one)"
    return None


def not_these_shapes(widths: tuple[int, ...], chunk: int) -> str | None:
    """Why the kernels do not take chunks of ``chunk`` tokens and a fast network of these layer widths."""
    if kind_of(widths) is None:
        return f"its fast network has {len(widths) - 1} layers; there are kernels for one and for two"
    if widths[0] not in HEAD_WIDTHS:
        return f"its heads have width {widths[0]}; the kernels take {', '.join(map(str, HEAD_WIDTHS))}"
    if chunk not in CHUNKS:
        return f"chunk: {chunk}; the kernels take {', '.join(map(str, CHUNKS))}"
    if len(widths) == 3 and widths[1] % 16:
        return f"its hidden width is {widths[1]}; the kernels take multiples of 16"
    return None


def not_by_auto(device: torch.device, widths: tuple[int, ...], chunk: int, products: Products,
                ) -> str | None:  # fmt: skip
    """Why ``auto`` takes another backend where the kernels could run, but for what ``trial`` finds."""
    kind = kind_of(widths)
    if (reason := by_name_alone(device)) is not None:
        return reason
    assert kind is not None  # else the kernels do not take these shapes
    if chunk not in BY_AUTO[kind] or widths[0] not in AUTO_HEAD_WIDTHS:
        return (
            f"chunk {chunk} at head width {widths[0]} was not measured; auto takes the kernels at chunk "
            f"{' and '.join(map(str, BY_AUTO[kind]))} and head widths {' and '.join(map(str, AUTO_HEAD_WIDTHS))}"
        )
    if kind == "mlp" and widths[1] != 4 * widths[0]:
        return f"a hidden width of {widths[1]} was not measured; auto takes the kernels at four times the head width"
    capability = torch.cuda.get_device_capability(device)
    return training_too_large(kind, chunk, widths[0], products, capability) or training_too_large(
        "around", BY_AUTO["around"][0], widths[0], products, capability
    )
