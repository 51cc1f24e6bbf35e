"""Moshi's language model as a host: its sites, base weights, carried training; blocks go in by ``attaching``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import fields
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeGuard, cast

import torch
from torch import Tensor, nn

from moshi_ttt.core.adapter import read_manifest
from moshi_ttt.core.block import SequenceBlock, Site, SiteInfo, SiteKind
from moshi_ttt.core.carry import Carry
from moshi_ttt.core.config import HostConfig
from moshi_ttt.core.errors import ContextError, HostError
from moshi_ttt.core.format import SequenceFormat
from moshi_ttt.core.host import CarriedState, HostModel, updates_switch
from moshi_ttt.core.volume import volume_switch
from moshi_ttt.hosts.moshi import attaching, base_weights, lora
from moshi_ttt.hosts.moshi.compatibility import require_unconditioned
from moshi_ttt.hosts.moshi.compiling import compiled_output
from moshi_ttt.hosts.moshi.flat_config import native_entries
from moshi_ttt.hosts.moshi.fsdp import sharding
from moshi_ttt.hosts.moshi.layers import TTTStreamingTransformer, block_sites, main_layers, switched
from moshi_ttt.hosts.moshi.loading import FILES, MoshiBundle, load_skeleton, resolve_repo
from moshi_ttt.hosts.moshi.losses import MoshiLosses, made_up_loss
from moshi_ttt.hosts.moshi.upstream import FRAME_RATE, ActivationGating, LMModel, LoRALinear

__all__ = ["MOSHI_HOST", "MoshiHost", "MoshiHostConfig", "main_layers", "require_lm"]


class MoshiHostConfig(HostConfig):
    """Which Moshi.

    Attributes:
        hf_repo: a hub repository name, a local folder laid out like one, ``builtin:tiny``, or, for planning only,
            ``builtin:moshi-7b`` (the published architecture; it has no weights).
        revision: a branch, tag or commit of the hub repository.
        dtype: what to load the weights as; None keeps the dtype they are stored in.
        moshi_weights, mimi_weights, tokenizer, config_path: local files used instead of the repository's own.
    """

    name: str = "moshi"
    hf_repo: str
    revision: str | None = None
    dtype: Literal["bfloat16", "float32"] | None = None
    moshi_weights: str | None = None
    mimi_weights: str | None = None
    tokenizer: str | None = None
    config_path: str | None = None

    def bundle(self) -> MoshiBundle:
        """The files this names, downloaded if need be. Raises HostError."""
        return resolve_repo(self.hf_repo, revision=self.revision, files=self.files)

    @property
    def files(self) -> dict[str, str]:
        """The files that replace the repository's own, by what they are."""
        named = {name: getattr(self, name) for name in FILES}
        return {name: path for name, path in named.items() if path is not None}

    @property
    def described(self) -> str:
        """A description of the model, for reports: the repository, its revision, and the files that replace its own."""
        revision = [f"revision {self.revision}"] if self.revision else []
        return ", ".join([self.hf_repo, *revision, *(f"{name} {path}" for name, path in self.files.items())])


class MoshiHost(HostModel):
    """Moshi's main transformer: a ``sequence`` site in every layer, and a ``feed_forward`` site where it is gated."""

    name: ClassVar[str] = "moshi"
    causal: ClassVar[bool] = True
    format_name: ClassVar[str] = "sequence"
    config_class: ClassVar[type[HostConfig]] = MoshiHostConfig

    def load(
        self,
        config: MoshiHostConfig,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        lora: bool = True,
    ) -> LMModel:
        """The language model named by ``config``; ``dtype`` wins over ``config.dtype``. Raises HostError.

        A LoRA that comes with it is merged into the weights, or with ``lora=False`` left out.
        """
        if dtype is None and config.dtype is not None:
            dtype = cast(torch.dtype, getattr(torch, config.dtype))
        return config.bundle().load_lm(device=device, dtype=dtype, lora=lora)

    def load_for_adapter(
        self, config: MoshiHostConfig, folder: str | Path, *, device: torch.device | str = "cpu"
    ) -> LMModel:
        """The base model that the adapter in ``folder`` was trained on: an adapter with a LoRA continues the one that
        comes with the model, so that is left out. Raises HostError, and AdapterError for no adapter."""
        return self.load(config, device=device, lora=not read_manifest(folder)["extra"])

    def config_for(self, name: str) -> MoshiHostConfig:
        """``name`` is a hub repository, a local folder laid out like one, or ``builtin:tiny``."""
        return MoshiHostConfig(hf_repo=name)

    def recognizes(self, model: nn.Module) -> bool:
        return isinstance(model, LMModel)

    def skeleton(self, config: MoshiHostConfig) -> LMModel:
        """The architecture on the meta device; of a hub repository, only config.json is fetched. Raises HostError."""
        dtype = cast(torch.dtype, getattr(torch, config.dtype)) if config.dtype else None
        return load_skeleton(config.hf_repo, revision=config.revision, dtype=dtype, config_path=config.config_path)

    def entries_of_mapping(self, mapping: Mapping[str, Any], where: str) -> tuple[list[dict[str, Any]], str]:
        return native_entries(mapping, where)

    def sites(self, model: nn.Module) -> tuple[SiteInfo, ...]:
        model = require_lm(model)
        adapter = SequenceFormat()
        found: list[SiteInfo] = []
        for index, layer in enumerate(main_layers(model)):
            attention = layer.self_attn
            projection = attention.in_projs[0]
            weight = cast(Tensor, (projection.frozen_W if isinstance(projection, LoRALinear) else projection).weight)
            shared: dict[str, Any] = {
                "dim": attention.embed_dim,
                "num_heads": attention.num_heads,
                "device": weight.device,
                "dtype": weight.dtype if weight.is_floating_point() else model.dtype,  # an integer: quantised weights
                "format": adapter,
                "frame_rate": FRAME_RATE,
            }
            found.append(SiteInfo(site=Site(index, SiteKind.SEQUENCE), **shared))
            gating = layer.gating
            if isinstance(gating, ActivationGating):
                site = Site(index, SiteKind.FEED_FORWARD)
                found.append(SiteInfo(site=site, mlp=gating, mlp_output=compiled_output, **shared))
        return tuple(found)

    def attach(self, model: nn.Module, blocks: Mapping[Site, SequenceBlock]) -> None:
        model = require_lm(model)
        attaching.attach(model, blocks, self.sites(model))

    def detach(self, model: nn.Module) -> dict[Site, SequenceBlock]:
        return attaching.detach(require_lm(model))

    def blocks(self, model: nn.Module) -> dict[Site, SequenceBlock]:
        return attaching.attached_blocks(require_lm(model))

    def base_state_dict(self, model: nn.Module) -> dict[str, Tensor]:
        return base_weights.base_state_dict(require_lm(model))

    def load_base(self, model: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
        base_weights.load_base(require_lm(model), state_dict)

    def fingerprint(self, model: nn.Module) -> dict[str, Any]:
        model = require_lm(model)
        attention = main_layers(model)[0].self_attn
        return {
            "host": self.name,
            "dim": model.dim,
            "num_layers": len(model.transformer.layers),
            "num_heads": attention.num_heads,
            "n_q": model.n_q,
            "dep_q": model.dep_q,
            "card": model.card,
            "text_card": model.text_card,
            "context": model.context,
            "delays": list(model.delays),
            "weights": base_weights.digest(model),
        }

    def extra_parameters(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """The factors of Moshi's own LoRA, if it was applied."""
        return base_weights.lora_factors(require_lm(model))

    def describe_extra(self, model: nn.Module) -> dict[str, Any]:
        found = lora.describe_lora(require_lm(model))
        return {"lora": found} if found else {}

    def add_extra(self, model: nn.Module, description: Mapping[str, Any]) -> None:
        if description.keys() != {"lora"}:
            raise HostError(f"Moshi can be given a LoRA, and this asks for {', '.join(description) or 'nothing'}.")
        lora.add_lora(require_lm(model), **description["lora"])

    def remove_extra(self, model: nn.Module) -> None:
        lora.remove_lora(require_lm(model))

    @contextmanager
    def carry(
        self,
        model: nn.Module,
        state: CarriedState | None = None,
        *,
        document_ids: Tensor | None = None,
    ) -> Iterator[CarriedState]:
        """Forward passes inside continue from ``state`` and store their own, detached, in the yielded object.

        Attention sees its own segment only. Without blocks in the model this does nothing.

        Raises:
            ContextError: nested, or the state or the document ids do not fit the model or each other.
            HostError: the model is streaming.
        """
        transformer = require_lm(model).transformer
        if attaching.is_streaming(transformer):
            raise HostError("host.carry is for training, and this model is streaming: leave streaming first.")
        if getattr(transformer, "_carry", None) is not None:
            raise ContextError("This model is already inside host.carry(...): contexts do not nest.")
        carry = Carry.open(self.blocks(model), state, document_ids)
        if not isinstance(transformer, TTTStreamingTransformer):
            yield carry.state
            return
        transformer._carry = carry
        try:
            yield carry.state
        finally:
            del transformer._carry

    @contextmanager
    def updates(self, model: nn.Module, enabled: bool | Tensor) -> Iterator[None]:
        transformer = require_lm(model).transformer
        enabled = updates_switch(enabled)
        with switched(transformer, "updates", enabled) if _has_blocks(transformer) else nullcontext():
            yield

    @contextmanager
    def volume(self, model: nn.Module, value: float | Tensor) -> Iterator[None]:
        transformer = require_lm(model).transformer
        value = volume_switch(value, self.blocks(model))
        with switched(transformer, "volume", value) if _has_blocks(transformer) else nullcontext():
            yield

    @contextmanager
    def frozen(self, model: nn.Module) -> Iterator[None]:
        transformer = require_lm(model).transformer
        layers = transformer.layers if isinstance(transformer, TTTStreamingTransformer) else ()
        sites = [site for layer in layers for site in block_sites(layer)]
        before = [site.frozen for site in sites]
        try:
            for site in sites:
                site.frozen = True
            yield
        finally:
            for site, was in zip(sites, before, strict=True):
                site.frozen = was

    def synthetic_loss(self, model: nn.Module, *, batch_size: int, length: int, seed: int) -> Tensor:
        """Moshi's audio loss on uniformly random tokens; the text loss of a model that predicts text alone.

        Raises HostError for a conditional model.
        """
        model = require_lm(model)
        require_unconditioned(model, "This model")
        generator = torch.Generator().manual_seed(seed)
        text = torch.randint(0, model.text_card, (batch_size, 1, length), generator=generator)
        audio = torch.randint(0, model.card, (batch_size, model.num_audio_codebooks, length), generator=generator)
        codes = torch.cat([text, audio], dim=1).to(model.device)
        return made_up_loss(model, codes)

    def losses(self, **options: float) -> MoshiLosses:
        """Text and audio; the options are ``MoshiLosses``'s attributes."""
        known = [each.name for each in fields(MoshiLosses)]
        if unknown := sorted(options.keys() - set(known)):
            raise HostError(f"Moshi's losses have no option {unknown[0]!r}. Options: {', '.join(known)}.")
        return MoshiLosses(**options)

    def fsdp_units(self, model: nn.Module) -> tuple[nn.Module, ...]:
        """Each block, the condition provider (always float32), each layer of both transformers, then the model."""
        model = require_lm(model)
        units: list[nn.Module] = list(self.blocks(model).values())
        if model.condition_provider is not None and any(True for _ in model.condition_provider.parameters()):
            units.append(model.condition_provider)
        units.extend(model.transformer.layers)
        if model.depformer is not None:
            units.extend(model.depformer.layers)
        return (*units, model)

    def stored_units(self, model: nn.Module) -> tuple[nn.Module, ...]:
        """Each block, and the condition provider, which is always float32."""
        provider = require_lm(model).condition_provider
        return (*self.blocks(model).values(), *(() if provider is None else (provider,)))

    def sharding(self, model: nn.Module) -> AbstractContextManager[None]:
        return sharding(require_lm(model))


MOSHI_HOST = MoshiHost()


def require_lm(model: nn.Module) -> LMModel:
    """``model`` itself, or HostError when it is not Moshi's language model."""
    if not isinstance(model, LMModel):
        raise HostError(
            f"The host 'moshi' works on Moshi's language model (LMModel), got {type(model).__name__}. "
            "For an LMGen, pass its lm_model."
        )
    return model


def _has_blocks(transformer: nn.Module) -> TypeGuard[TTTStreamingTransformer]:
    return isinstance(transformer, TTTStreamingTransformer)
