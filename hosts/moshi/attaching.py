"""Blocks into Moshi's transformer and out of it: what may be attached, and the change of classes.

See ``layers`` for what the classes do.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from moshi_ttt.core.block import SequenceBlock, Site, SiteInfo
from moshi_ttt.core.errors import HostError
from moshi_ttt.hosts.moshi.layers import (
    MODULE_NAMES,
    BlockSite,
    TTTLMModel,
    TTTStreamingTransformer,
    TTTStreamingTransformerLayer,
    block_sites,
    clear_streaming_caches,
    main_layers,
)
from moshi_ttt.hosts.moshi.upstream import (
    LMModel,
    StreamingModule,
    StreamingTransformer,
    StreamingTransformerLayer,
)


def attached_blocks(model: LMModel) -> dict[Site, SequenceBlock]:
    """The blocks that are in the model, by site, in layer order."""
    return {site.site: site.block for layer in main_layers(model) for site in block_sites(layer)}


def attach(model: LMModel, blocks: Mapping[Site, SequenceBlock], sites: Sequence[SiteInfo]) -> None:
    """Put ``blocks`` into the model, whose sites are ``sites``.

    Raises HostError with every problem found; the model is then as it was.
    """
    require_idle(model, "attach blocks")
    here = {info.site: info for info in sites}
    problems = [
        f"{site}: {problem}" for site, block in blocks.items() for problem in _problems(model, site, block, here)
    ]
    if not attached_blocks(model):
        problems += _foreign_classes(model)
    if problems:
        raise HostError("No block was attached:\n" + "\n".join(f"- {problem}" for problem in problems))
    if not blocks:
        return
    model.__class__ = TTTLMModel
    model.transformer.__class__ = TTTStreamingTransformer
    for layer in main_layers(model):
        layer.__class__ = TTTStreamingTransformerLayer
    for site, block in blocks.items():
        layer = main_layers(model)[site.layer]
        setattr(layer, MODULE_NAMES[site.kind], BlockSite(block).train(layer.training))
    clear_streaming_caches(model)


def detach(model: LMModel) -> dict[Site, SequenceBlock]:
    """Take all blocks out, and return them. Raises HostError while the model streams, carries or is sharded."""
    blocks = attached_blocks(model)
    if not blocks:
        return {}
    require_idle(model, "detach blocks")
    for layer in main_layers(model):
        for site in block_sites(layer):
            delattr(layer, MODULE_NAMES[site.site.kind])
        for name in ("_context", "_by_parts"):
            vars(layer).pop(name, None)
        layer.__class__ = StreamingTransformerLayer
    for name in ("_carry", "_updates", "_volume"):
        vars(model.transformer).pop(name, None)
    model.transformer.__class__ = StreamingTransformer
    model.__class__ = LMModel
    clear_streaming_caches(model)
    return blocks


def is_streaming(transformer: nn.Module) -> bool:
    """Whether a module of the transformer has a streaming state."""
    return any(isinstance(m, StreamingModule) and m._streaming_state is not None for m in transformer.modules())


def require_idle(model: LMModel, what: str) -> None:
    """Raise HostError while the model streams, carries or is sharded: its parts are in use."""
    if is_streaming(model.transformer):
        raise HostError(f"Cannot {what} while the model is streaming: leave streaming first.")
    if getattr(model.transformer, "_carry", None) is not None:
        raise HostError(f"Cannot {what} inside host.carry(...): leave the context first.")
    if any(isinstance(module, FSDPModule) for module in model.modules()):
        raise HostError(f"Cannot {what} on a sharded model: do it before sharding.")


def _problems(model: LMModel, site: Site, block: SequenceBlock, infos: Mapping[Site, SiteInfo]) -> Iterator[str]:
    """Why ``block`` cannot be put at ``site`` of the model."""
    if site not in infos:
        yield f"there is no such site; the layers are 0 to {len(main_layers(model)) - 1}."
        return
    made, here = block.info, infos[site]
    if block.kind is not site.kind:
        yield f"the block is for {block.kind} sites."
    if made.site != site:
        yield f"the block was built for {made.site}."
    if (made.dim, made.num_heads, made.dtype) != (here.dim, here.num_heads, here.dtype):
        yield (
            f"the block was planned for width {made.dim}, {made.num_heads} heads and {made.dtype}, the layer has "
            f"width {here.dim}, {here.num_heads} heads and {here.dtype}; plan it on this model."
        )
    if not block.causal:
        yield "the block is not causal, and Moshi is: it would see the future."
    if site in attached_blocks(model):
        yield "there is a block already; detach it first."
    devices = {parameter.device for parameter in block.parameters()} - {torch.device("meta")}
    if here.device.type != "meta" and devices - {here.device}:
        yield f"the block is on {', '.join(map(str, devices))}, its layer on {here.device}."


def _foreign_classes(model: LMModel) -> list[str]:
    """Complaints about classes other than Moshi's own: changing them to ours would lose what they do."""
    expected: list[tuple[nn.Module, type[nn.Module]]] = [(model, LMModel), (model.transformer, StreamingTransformer)]
    expected += [(layer, StreamingTransformerLayer) for layer in main_layers(model)]
    return [
        f"the model has a {type(module).__name__} where Moshi has a {wanted.__name__}; blocks go into Moshi's own."
        for module, wanted in expected
        if type(module) is not wanted
    ]
