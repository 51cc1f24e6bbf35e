"""Moshi's transformer with blocks in it.

Blocks are put in by changing the class of the model, of its main transformer and of its layers to the subclasses below,
and by adding one module where there is a block: ``layer.ttt`` between attention and the feed-forward,
``layer.ttt_feed_forward`` in the gated MLP's place. No parameter moves, so none is renamed; changing the classes back
and deleting those modules gives the base model.

What one forward pass knows (input embeddings, carried states) is a ``ForwardContext``: made by the transformer for
that pass, handed to the layers as an argument, and so kept by activation checkpointing for the layers it runs again in
backward.

Shape legend: B streams, T tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from moshi_ttt.core.block import BlockContext, SequenceBlock, Site, SiteKind
from moshi_ttt.core.carry import Carry, ForwardContext
from moshi_ttt.core.casts import ParameterCasts
from moshi_ttt.core.errors import ContextError, HostError
from moshi_ttt.hosts.moshi.compiling import eager_on_cpu_call
from moshi_ttt.hosts.moshi.streaming import BlockStreamState
from moshi_ttt.hosts.moshi.upstream import (
    LMModel,
    StreamingModule,
    StreamingTransformer,
    StreamingTransformerLayer,
)

Switch = Literal["updates", "volume"]
SWITCHES: tuple[Switch, ...] = get_args(Switch)
"""What a host switches for all blocks, for all rows or row by row."""

MODULE_NAMES: dict[SiteKind, str] = {SiteKind.SEQUENCE: "ttt", SiteKind.FEED_FORWARD: "ttt_feed_forward"}
"""What the module of a block is called in its layer."""


class BlockSite(StreamingModule[BlockStreamState]):
    """The module that is added to a layer: one block, and its state while Moshi streams.

    Attributes:
        updates: whether a stream that starts now starts with test-time updates enabled, for all rows or ``[B]`` bool.
        frozen: whether the block's parameters are declared not to change in a stream that starts now.
        volume: at which it starts, for all rows or ``[B]``.
    """

    def __init__(self, block: SequenceBlock) -> None:
        super().__init__()
        self.block = block
        self.updates: bool | Tensor = True
        self.frozen = False
        self.volume: float | Tensor = 1.0

    @property
    def site(self) -> Site:
        return self.block.info.site

    @property
    def device(self) -> torch.device:
        """Where the block is now: it may have been built on meta, or moved since."""
        parameter = next(self.block.parameters(), None)
        return self.block.info.device if parameter is None else parameter.device

    def _init_streaming_state(self, batch_size: int) -> BlockStreamState:
        refuse_sharded(self.block)
        device = self.device
        self.check_rows(batch_size)
        state = BlockStreamState(batch_size, device, self.block, self.block.allocate_state(batch_size, device))
        state.set_switch("updates", self.updates)
        state.set_switch("volume", self.volume)
        state.casts = ParameterCasts(self.block, frozen=self.frozen)
        return state

    def check_rows(self, rows: int) -> None:
        """Raise ContextError where a switch is set row by row, and a stream would have another number of rows."""
        for name in SWITCHES:
            value = getattr(self, name)
            if isinstance(value, Tensor) and len(value) != rows:
                raise ContextError(_rows_differ(name, value, rows))

    def forward(self, x: Tensor, context: ForwardContext) -> Tensor:
        """``x [B, T, D]`` through the block: a plain call, a carried call or a streamed step."""
        streaming = self._streaming_state
        if streaming is not None:
            if streaming.recent is not None:
                streaming.recent.add(x, context.input_embeddings, streaming.exec_mask)
            token = BlockContext(
                exec_mask=streaming.exec_mask,
                input_embeddings=context.input_embeddings,
                updates=streaming.updates,
                volume=streaming.volume if self.block.scales_output else 1.0,
                casts=streaming.casts,
            )
            return self.block.step(x, streaming.buffers, token)
        return context.run(self.block, x)


def main_layers(model: LMModel) -> list[StreamingTransformerLayer]:
    """The layers of the main transformer, which are what Moshi's sites number."""
    return [cast(StreamingTransformerLayer, layer) for layer in model.transformer.layers]


def block_sites(layer: torch.nn.Module) -> list[BlockSite]:
    """The added modules of a layer, in the order they run."""
    found = (getattr(layer, name, None) for name in MODULE_NAMES.values())
    return [site for site in found if isinstance(site, BlockSite)]


def refuse_sharded(block: SequenceBlock) -> None:
    """Raise HostError when a block's parameters are sharded."""
    for name, parameter in block.named_parameters():
        if isinstance(parameter, DTensor):
            raise HostError(
                f"{name} of the block at {block.info.site} is sharded, and a sharded model cannot stream. "
                "Save the adapter, load it into an unsharded model, and stream that."
            )


class TTTStreamingTransformerLayer(StreamingTransformerLayer):
    """A layer that may have a block between attention and the feed-forward, and one in the feed-forward's place."""

    # The context of the call that is running. Moshi's own forward, which this one surrounds, has no argument for it.
    _context: ForwardContext | None = None

    # Whether that call keeps the input of each part alone, for a backward pass that computes the parts again.
    _by_parts = False

    def forward(
        self,
        x: Tensor,
        cross_attention_src: Tensor | None = None,
        ttt: ForwardContext | None = None,
        checkpointing: bool = False,
    ) -> Tensor:
        """``x [B, T, D]`` to ``[B, T, D]``.

        Args:
            x: of the layer before.
            cross_attention_src: as in Moshi's own layer.
            ttt: the context of this forward pass.
            checkpointing: computes the layer again in the backward pass. A layer with a block is computed again in
                parts, each in its turn (attention, the block, the feed-forward), so that no two parts hold what they
                keep for it at the same time.
        """
        if checkpointing and not block_sites(self):
            return self._checkpointed(self._whole, x, cross_attention_src)
        outer = self._context, self._by_parts
        self._context, self._by_parts = ttt, checkpointing
        try:
            return self._whole(x, cross_attention_src)
        finally:
            self._context, self._by_parts = outer

    def _whole(self, x: Tensor, cross_attention_src: Tensor | None) -> Tensor:
        return cast(Tensor, super().forward(x, cross_attention_src))

    def _checkpointed(self, function: Callable[..., Tensor], *given: Any) -> Tensor:
        """``function(*given)``, of which the arguments alone are kept; the options are those of Moshi's own."""
        return cast(
            Tensor,
            checkpoint(
                eager_on_cpu_call, function, *given,
                use_reentrant=False, determinism_check="none", preserve_rng_state=False,
            ),
        )  # fmt: skip

    def _part(self, function: Callable[..., Tensor], *given: Any) -> Tensor:
        return self._checkpointed(function, *given) if self._by_parts else function(*given)

    def _sa_block(self, x: Tensor) -> Tensor:
        return self._part(super()._sa_block, x)

    def _cross_attention_block(self, x: Tensor, cross_attention_src: Tensor) -> Tensor:
        return self._part(super()._cross_attention_block, x, cross_attention_src)

    def _ff_block(self, x: Tensor) -> Tensor:
        context = self._context or ForwardContext()
        sites = {site.site.kind: site for site in block_sites(self)}
        if SiteKind.SEQUENCE in sites:
            x = self._part(sites[SiteKind.SEQUENCE], x, context)
        if SiteKind.FEED_FORWARD in sites:
            return self._part(self._with_block, x, sites[SiteKind.FEED_FORWARD], context)
        return self._part(super()._ff_block, x)

    def _with_block(self, x: Tensor, site: BlockSite, context: ForwardContext) -> Tensor:
        """The feed-forward part with the block of ``site`` in the place of the MLP."""
        update: Tensor = site(self.norm2(x), context)
        return x.to(update) + cast(Tensor, self.layer_scale_2(update))


class TTTStreamingTransformer(StreamingTransformer):
    """The main transformer: makes the context of each forward pass."""

    _carry: Carry | None = None
    _updates: bool | Tensor = True
    _volume: float | Tensor = 1.0

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """``x [B, T, D]``, the input embeddings, to ``[B, T, D]``."""
        carry = self._carry
        switches: dict[str, Any] = {"updates": self._updates, "volume": self._volume}
        context = ForwardContext(x, **switches) if carry is None else carry.begin(x, **switches)
        # Moshi's own forward would keep whole layers, and compute parts of them a third time.
        checkpointing, self.checkpointing = self.checkpointing, False
        try:
            y: Tensor = super().forward(x, *args, ttt=context, checkpointing=checkpointing, **kwargs)
        finally:
            self.checkpointing = checkpointing
        if carry is not None:
            carry.advance(context)
        return y

    def _init_streaming_state(self, batch_size: int) -> Any:
        # Checked here too, before any layer has state: a refusal then leaves no layer streaming where the transformer
        # streams by itself.
        if self._carry is not None:
            raise HostError("Streaming cannot start inside host.carry(...): leave the context first.")
        for layer in self.layers:
            for site in block_sites(layer):
                refuse_sharded(site.block)
                site.check_rows(batch_size)
        return super()._init_streaming_state(batch_size)


class TTTLMModel(LMModel):
    """The language model. A stream that is refused leaves none of its modules streaming, so that another can start."""

    def streaming(self, batch_size: int) -> ExitStack:
        """See ``StreamingModule.streaming``, which sets the state of one module after the other."""
        modules = [module for module in self.modules() if isinstance(module, StreamingModule)]
        idle = [module for module in modules if module._streaming_state is None]
        try:
            return super().streaming(batch_size)
        except BaseException:
            for module in idle:
                module._streaming_state = None
            raise


@contextmanager
def switched(transformer: TTTStreamingTransformer, name: Switch, value: float | Tensor) -> Iterator[None]:
    """See ``HostModel.updates`` and ``HostModel.volume``; ``value`` is what its own switch gives."""
    sites = [site for layer in transformer.layers for site in block_sites(layer)]
    if isinstance(value, Tensor):
        value = value.to(sites[0].device if sites else value.device)
        for site in sites:
            if site._streaming_state is not None and site._streaming_state.batch_size != len(value):
                raise ContextError(_rows_differ(name, value, site._streaming_state.batch_size))
    before = getattr(transformer, f"_{name}")
    try:
        _set_switch(transformer, sites, name, value)
        yield
    finally:
        _set_switch(transformer, sites, name, before)


def _set_switch(
    transformer: TTTStreamingTransformer, sites: list[BlockSite], name: Switch, value: float | Tensor
) -> None:
    # All sites first: where a stream of another number of rows is refused, no site is left with another answer.
    setattr(transformer, f"_{name}", value)
    for site in sites:
        setattr(site, name, value)
    for site in sites:
        if site._streaming_state is not None:
            site.check_rows(site._streaming_state.batch_size)
            site._streaming_state.set_switch(name, value)


def _rows_differ(name: str, value: Tensor, rows: int) -> str:
    return (
        f"{name} has {len(value)} rows, and the stream has {rows}: give one answer a row. With guidance an LMGen "
        "streams two rows for each voice, b and B + b."
    )


def clear_streaming_caches(model: torch.nn.Module) -> None:
    """Make Moshi look for streaming children again: it lists them once, and would skip a module added later."""
    for module in model.modules():
        if isinstance(module, StreamingModule):
            module._cached_children = None
