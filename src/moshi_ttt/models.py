"""Loading a base model by its name: the first line of a program."""

from __future__ import annotations

import torch
from torch import nn

from moshi_ttt.core.config import HostConfig
from moshi_ttt.core.errors import ConfigError
from moshi_ttt.core.registry import Registry, default_registry

DEFAULT_HOST = "moshi"


def load_model(
    model: str | HostConfig,
    *,
    host: str | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    registry: Registry | None = None,
) -> nn.Module:
    """A pretrained base model, in eval mode.

    Args:
        model: for Moshi a hub repository such as ``kyutai/moshiko-pytorch-bf16``, a local folder laid out like one, or
            ``builtin:tiny``, the small Moshi that ships with this package. Or a host's configuration, such as
            ``MoshiHostConfig``, which says more: a revision, files that replace the repository's own.
        host: the registered name of the host that loads it; None is ``moshi``, or the host of the configuration.
        device: where to.
        dtype: of the weights; None is the dtype in which they are stored, or that of the configuration.
        registry: where the host is looked up; the process's registry by default.

    Raises:
        UnknownNameError: there is no such host; the message lists those there are.
        ConfigError: ``model`` is neither a name nor a configuration of the host; a device that is not there, or a
            dtype that is no floating-point dtype.
        HostError: there is no such model, it is incomplete, or the hub cannot be reached.
    """
    registry, device = registry or default_registry(), _checked_device(device)
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ConfigError(f"dtype: got {dtype!r}. Give a floating-point dtype, as torch.bfloat16, or leave it out.")
    if isinstance(model, HostConfig):
        if host is not None and host != model.name:
            raise ConfigError(f"The configuration is for the host {model.name!r}, not for {host!r}. Leave host out.")
        adapter = registry.host(model.name)
        if not isinstance(model, adapter.config_class):
            raise ConfigError(
                f"The host {adapter.name!r} takes a {adapter.config_class.__name__}, got a {type(model).__name__}."
            )
        return adapter.load(model, device=device, dtype=dtype)
    if not isinstance(model, str):
        raise ConfigError(
            f"load_model takes the name of a model, or a host's configuration; got {model!r}. For a folder, give "
            "str(path)."
        )
    adapter = registry.host(DEFAULT_HOST if host is None else host)
    return adapter.load(adapter.config_for(model), device=device, dtype=dtype)


def _checked_device(given: torch.device | str) -> torch.device:
    try:
        device = torch.device(given)
    except (RuntimeError, TypeError):
        raise ConfigError(f"device: got {given!r}. Give 'cpu', 'cuda', or a device such as 'cuda:1'.") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device: got {str(given)!r}, and this machine has no CUDA device. Give 'cpu'.")
    return device
