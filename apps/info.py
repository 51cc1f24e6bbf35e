"""``moshi-ttt info``: the machine, the versions, and which faster forms of each variant can be used here."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from moshi_ttt.core.errors import MoshiTTTError
from moshi_ttt.system.threads import available_cores

if TYPE_CHECKING:
    from moshi_ttt.core.accelerations import Acceleration
    from moshi_ttt.core.registry import Registry

DISTRIBUTION = "moshi-ttt"
OPTIONAL = ("triton", "tensorboard", "wandb")
"""Distributions that some options need, and that the package does not install by itself."""
VARIABLES = (
    "MOSHI_TTT_PLUGINS", "CXX", "XDG_CACHE_HOME", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "MKL_NUM_THREADS",
    "NO_TORCH_COMPILE", "HF_HUB_OFFLINE",
)  # fmt: skip
"""Environment variables that change what the package does."""
CPUINFO = Path("/proc/cpuinfo")
PLAIN = "tensor operations"


@dataclass(frozen=True, kw_only=True)
class Information:
    """What ``moshi-ttt info`` prints.

    Attributes:
        system: label -> value: Python, operating system, processor, devices.
        packages: distribution -> version, those with plugins too; None where it is not installed.
        compilers: purpose -> path and version, or why there is none.
        environment: variables of ``VARIABLES`` that are set.
        backends: variant -> its faster forms, or one sentence that says why they are not known.
        problems: what is broken in this installation, as sentences.
    """

    system: Mapping[str, str]
    packages: Mapping[str, str | None]
    compilers: Mapping[str, str]
    environment: Mapping[str, str]
    backends: Mapping[str, tuple[Acceleration, ...] | str]
    problems: tuple[str, ...]


def gather(registry: Registry | None = None) -> Information:
    """Everything, for this machine. A part that is broken is a sentence in ``problems`` and ends nothing.

    ``registry`` is where variants are looked up; the process's own by default.
    """
    problems: list[str] = []
    system = {
        "Python": f"{platform.python_version()} ({platform.python_implementation()})",
        "operating system": platform.platform(),
        "processor": f"{_processor()}, {available_cores()} cores for this process",
        **_torch_facts(problems),
    }
    found = _discovered(registry, problems)
    plugins = {record.provenance.distribution: record.provenance.version for record in found.plugins()} if found else {}
    return Information(
        system=system,
        packages={name: _installed(name) for name in (DISTRIBUTION, *required(), *OPTIONAL)} | plugins,
        compilers={"C++ (compiled steps, torch.compile)": compiler()},
        environment={name: _without_home(os.environ[name]) for name in VARIABLES if name in os.environ},
        backends=_backends(found) if found else {},
        problems=tuple(problems),
    )


def required() -> list[str]:
    """The distributions that moshi-ttt installs, by name, as its metadata list them."""
    lines = metadata.requires(DISTRIBUTION) or []
    names = [re.match(r"[A-Za-z0-9_.-]+", line) for line in lines if "extra ==" not in line]
    return [name.group() for name in names if name is not None]


def compiler() -> str:
    """The C++ compiler that builds what is compiled on this machine: its path and version, or that there is none."""
    name = os.environ.get("CXX", "g++")
    path = shutil.which(name)
    if path is None:
        return f"{name} was not found. Install g++, or name another compiler in CXX."
    try:
        done = subprocess.run([path, "--version"], capture_output=True, encoding="utf-8", errors="replace", timeout=30)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{_without_home(path)} cannot be run: {error}"
    said = done.stdout.strip().splitlines()
    return f"{_without_home(path)}: {said[0] if said else f'no version; exit code {done.returncode}'}"


def to_json(found: Information) -> dict[str, Any]:
    """The same for a program: a list of forms for each variant, with the reason of each that is missing."""
    backends = {
        name: {"error": forms} if isinstance(forms, str) else {"forms": [_form(each) for each in forms]}
        for name, forms in found.backends.items()
    }
    return {
        "system": dict(found.system), "packages": dict(found.packages), "compilers": dict(found.compilers),
        "environment": dict(found.environment), "backends": backends, "problems": list(found.problems),
    }  # fmt: skip


def render(found: Information) -> RenderableType:
    """Tables to read, and to paste into a bug report."""
    packages = {name: version or "not installed" for name, version in found.packages.items()}
    variants = Table(title="Faster forms of each variant on this machine", title_justify="left")
    for heading in ("variant", "form", "usable", "what it is for, or why it cannot be used"):
        variants.add_column(heading, no_wrap=heading in ("variant", "usable"))
    for variant, forms in found.backends.items():
        if isinstance(forms, str):
            variants.add_row(variant, "not known", Text("no", style="red"), Text(forms, overflow="fold"))
            continue
        variants.add_row(variant, PLAIN, Text("yes", style="green"), "Training and streaming, on every device.")
        for each in forms:
            usable = Text("yes", style="green") if each.available else Text("no", style="yellow")
            variants.add_row(
                "", each.name, usable, Text(each.missing or f"{each.purpose} {each.origin}".strip(), overflow="fold")
            )
    parts: list[RenderableType] = [
        _pairs("System", found.system), _pairs("Packages", packages), _pairs("Compilers", found.compilers),
        _pairs("Environment variables", found.environment or {"none": "of those that change what moshi-ttt does"}),
        variants,
    ]  # fmt: skip
    parts += [Text(f"Problem: {problem}", style="red", overflow="fold") for problem in found.problems]
    return Group(*parts)


def _pairs(title: str, values: Mapping[str, str]) -> Table:
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in values.items():
        table.add_row(Text(name), Text(value))
    return table


def _form(each: Acceleration) -> dict[str, Any]:
    return {**asdict(each), "available": each.available}


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    if CPUINFO.is_file():
        lines = CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines()
        named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        if named:
            return f"{named[0]} ({platform.machine()})"
    return platform.processor() or platform.machine()


def _torch_facts(problems: list[str]) -> dict[str, str]:
    """Build, instruction set and CUDA devices; nothing, and a problem, where torch cannot be imported."""
    try:
        import torch
    except Exception as error:  # a broken installation fails in any way, and this command is to say how
        problems.append(f"torch cannot be imported: {type(error).__name__}: {error}. Install it again.")
        return {}
    facts = {"PyTorch": f"{torch.__version__}, instruction set {torch.backends.cpu.get_cpu_capability()}"}
    built = torch.version.cuda or torch.version.hip
    if built is None:
        return facts | {"CUDA": "This PyTorch was built without CUDA."}
    if not torch.cuda.is_available():
        return facts | {"CUDA": f"PyTorch is built for {built} and finds no device."}
    facts["CUDA"] = f"PyTorch is built for {built}"
    for index in range(torch.cuda.device_count()):
        each = torch.cuda.get_device_properties(index)
        capability = f"compute capability {each.major}.{each.minor}"
        facts[f"cuda:{index}"] = f"{each.name}, {each.total_memory / 2**30:.1f} GiB, {capability}"
    return facts


def _discovered(registry: Registry | None, problems: list[str]) -> Registry | None:
    """The registry, and a problem for each plugin that is not loaded; None where torch cannot be imported."""
    if problems:
        return None
    from moshi_ttt.core.registry import default_registry

    registry = registry or default_registry()
    problems += [
        f"Plugin {record.provenance} is {record.status}: {record.reason}"
        for record in registry.plugins()
        if record.status not in ("loaded", "disabled")
    ]
    return registry


def _backends(registry: Registry) -> dict[str, tuple[Acceleration, ...] | str]:
    """The faster forms of each registered variant, or why they are not known."""
    from moshi_ttt.core.accelerations import accelerations_of

    found: dict[str, tuple[Acceleration, ...] | str] = {}
    for name in registry.names("block"):
        try:
            found[name] = accelerations_of(name, registry)
        except MoshiTTTError as error:
            found[name] = str(error)
        except Exception as error:  # a third party's report can fail in any way; the others are still shown
            found[name] = f"Its report failed: {type(error).__name__}: {error}"
    return found


def _without_home(text: str) -> str:
    """``text`` with the user's home as ``~``: a bug report need not say who the user is."""
    home = str(Path.home())
    return text.replace(home, "~") if len(home) > len(os.sep) else text
