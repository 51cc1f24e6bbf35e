"""The denoiser as a host: a ``sequence`` site in every layer, for blocks that may use future tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from moshi_ttt.core.base_weights import load_base_weights, weight_digest
from moshi_ttt.core.block import SequenceBlock, Site, SiteInfo, SiteKind
from moshi_ttt.core.config import HostConfig, Seed
from moshi_ttt.core.errors import HostError
from moshi_ttt.core.format import SequenceFormat
from moshi_ttt.core.host import CarriedState, HostModel, updates_switch
from moshi_ttt.core.volume import volume_switch
from moshi_ttt.hosts.audio.losses import AudioLosses, denoising_loss
from moshi_ttt.hosts.audio.model import AudioDenoiser, AudioLayer


class AudioHostConfig(HostConfig):
    """A denoiser with random weights.

    Attributes:
        dim, num_heads, num_layers: of the transformer.
        frame: samples a token.
        seed: of the weights.
    """

    name: str = "audio"
    dim: int = Field(default=64, ge=2)
    num_heads: int = Field(default=4, ge=1)
    num_layers: int = Field(default=2, ge=1)
    frame: int = Field(default=32, ge=1)
    seed: Seed = 0


class AudioHost(HostModel):
    """The model takes whole recordings, so blocks may be bidirectional, and no state is carried or streamed."""

    name: ClassVar[str] = "audio"
    causal: ClassVar[bool] = False
    config_class: ClassVar[type[HostConfig]] = AudioHostConfig

    def load(
        self, config: AudioHostConfig, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
    ) -> AudioDenoiser:
        if config.dim % config.num_heads:
            raise HostError(f"dim {config.dim} is no multiple of num_heads {config.num_heads}. Choose another.")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            model = AudioDenoiser(config.dim, config.num_heads, config.num_layers, config.frame)
        return model.to(device=device, dtype=dtype).eval()

    def skeleton(self, config: AudioHostConfig) -> AudioDenoiser:
        with torch.device("meta"):
            return AudioDenoiser(config.dim, config.num_heads, config.num_layers, config.frame)

    def sites(self, model: nn.Module) -> tuple[SiteInfo, ...]:
        model = _checked(model)
        weight = model.encode.weight
        return tuple(
            SiteInfo(
                site=Site(index, SiteKind.SEQUENCE), dim=model.dim, num_heads=model.num_heads, device=weight.device,
                dtype=weight.dtype, format=SequenceFormat(),
            )
            for index in range(len(model.layers))
        )  # fmt: skip

    def attach(self, model: nn.Module, blocks: Mapping[Site, SequenceBlock]) -> None:
        layers = _layers(model)
        wrong = [site for site in blocks if site.kind is not SiteKind.SEQUENCE or site.layer >= len(layers)]
        if wrong or any(layers[site.layer].ttt is not None for site in blocks):
            raise HostError(f"No block was attached: no free sequence site at {', '.join(map(str, wrong or blocks))}.")
        for site, block in blocks.items():
            layers[site.layer].ttt = block

    def detach(self, model: nn.Module) -> dict[Site, SequenceBlock]:
        found = self.blocks(model)
        for layer in _layers(model):
            layer.ttt = None
        return found

    def blocks(self, model: nn.Module) -> dict[Site, SequenceBlock]:
        layers = enumerate(_layers(model))
        return {Site(index, SiteKind.SEQUENCE): layer.ttt for index, layer in layers if layer.ttt is not None}

    def base_state_dict(self, model: nn.Module) -> dict[str, Tensor]:
        added = tuple(f"layers.{site.layer}.ttt." for site in self.blocks(model))
        return {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(added)}

    def load_base(self, model: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
        load_base_weights(model, {name: name for name in self.base_state_dict(model)}, state_dict)

    def fingerprint(self, model: nn.Module) -> dict[str, Any]:
        model = _checked(model)
        weights = weight_digest(self.base_state_dict(model))
        return {"host": self.name, "dim": model.dim, "num_layers": len(model.layers), "weights": weights}

    def earlier_fingerprints(self, model: nn.Module) -> Sequence[Mapping[str, Any]]:
        weights, now = self.base_state_dict(model), self.fingerprint(model)
        if now["weights"] is None:
            return ()
        digest = hashlib.sha256()  # the first values of each parameter, before the digest was core's
        for name, tensor in sorted(weights.items()):
            digest.update(name.encode() + tensor.detach().flatten()[:16].float().cpu().numpy().tobytes())
        return ({**now, "weights": digest.hexdigest()},)

    @contextmanager
    def carry(
        self,
        model: nn.Module,
        state: CarriedState | None = None,
        *,
        document_ids: Tensor | None = None,
    ) -> Iterator[CarriedState]:
        """A call is a whole recording: nothing is carried."""
        _checked(model)
        yield CarriedState()

    @contextmanager
    def updates(self, model: nn.Module, enabled: bool | Tensor) -> Iterator[None]:
        model = _checked(model)
        before, model.updates = model.updates, updates_switch(enabled)
        try:
            yield
        finally:
            model.updates = before

    @contextmanager
    def volume(self, model: nn.Module, value: float | Tensor) -> Iterator[None]:
        model = _checked(model)
        before, model.volume = model.volume, volume_switch(value, self.blocks(model))
        try:
            yield
        finally:
            model.volume = before

    def synthetic_loss(self, model: nn.Module, *, batch_size: int, length: int, seed: int) -> Tensor:
        """The denoising loss on synthetic tones in noise."""
        return denoising_loss(_checked(model), batch_size, length, seed)

    def losses(self, **options: float) -> AudioLosses:
        """The denoising loss; it has no options."""
        if options:
            raise HostError(f"The denoiser's loss has no options, got {', '.join(sorted(options))}.")
        return AudioLosses()

    def fsdp_units(self, model: nn.Module) -> Sequence[nn.Module]:
        return [*self.blocks(model).values(), *_layers(model), model]


def _checked(model: nn.Module) -> AudioDenoiser:
    if not isinstance(model, AudioDenoiser):
        raise HostError(f"The host 'audio' works on its own AudioDenoiser, got {type(model).__name__}.")
    return model


def _layers(model: nn.Module) -> list[AudioLayer]:
    return [cast(AudioLayer, layer) for layer in _checked(model).layers]


AUDIO_HOST = AudioHost()
