"""A third party's block whose state is more than memory: a causal short convolution keeps the token before."""

from __future__ import annotations

import pytest
import torch

from moshi_ttt import inject, parse_config
from moshi_ttt.core import testing as kit
from moshi_ttt.core.block import SequenceBlock
from moshi_ttt.core.errors import InjectionError
from moshi_ttt.core.registry import default_registry
from moshi_ttt.core.testing import BlockCase
from moshi_ttt.plugins.ttt_linear.block import TTTLinear
from moshi_ttt.plugins.ttt_linear.config import TTTLinearConfig


class ConvolvedConfig(TTTLinearConfig):
    variant: str = "convolved"


class Convolved(TTTLinear):
    """What TTT-Linear adds to x_t + 0.5 x_(t-1), added to x_t. Its state has x_(t-1), ``[B, 1, D]``, which updates do
    not write.
    """

    skips_nonfinite = False  # through the cache a token that is not finite reaches the next one

    def init_state(self, batch_size, device=None):
        state = super().init_state(batch_size, device)
        like = next(iter(state.values()))
        return {**state, "last": like.new_zeros(batch_size, 1, self.info.dim, dtype=self.roles.state)}

    def memory_names(self):
        return super().memory_names() - {"last"}

    def compute(self, x, state, context):
        state = dict(state or self.init_state(x.shape[0], x.device))
        last = state.pop("last")
        mixed = x + 0.5 * torch.cat([last.to(x), x[:, :-1]], dim=1)
        y, after = super().compute(mixed, state, context)
        moved = torch.where(y == mixed, x, x + (y - mixed))  # bit for bit x where nothing is added: -0 + 0 is 0
        return moved, {**after, "last": x[:, -1:].to(last)}

    def step(self, x, state, context=None):
        return SequenceBlock.step(self, x, state, context)


def registry_of(block: type[SequenceBlock]):
    registry = default_registry().copy()
    registry.register_block("convolved", config=ConvolvedConfig, block=block)
    return registry


@pytest.mark.exhaustive  # conv_kernel is among the options of the kit's own tests
@pytest.mark.parametrize("check", kit.CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_it_passes_the_kit(check, dtype):
    config = ConvolvedConfig(chunk=4)
    if check is kit.check_long_stream:
        check(BlockCase(variant="convolved", config=config, dtype=dtype, registry=registry_of(Convolved)), steps=50)
        return
    check(BlockCase(variant="convolved", config=config, dtype=dtype, registry=registry_of(Convolved)))


def test_a_cache_called_memory_is_caught():
    class Wrong(Convolved):
        memory_names = SequenceBlock.memory_names

    case = BlockCase(variant="convolved", config=ConvolvedConfig(chunk=4), registry=registry_of(Wrong))
    with pytest.raises(AssertionError, match="updates are off, state 'last'"):
        kit.check_updates_off(case)


class Unscaled(TTTLinear):
    """A block that knows nothing of the factor of the inner learning rate."""

    scales_inner_lr = False

    def _tokens(self, *args, **named):
        factor, self.inner_lr_factor = self.inner_lr_factor, 1.0
        try:
            return super()._tokens(*args, **named)
        finally:
            self.inner_lr_factor = factor


def test_a_schedule_that_a_block_ignores_is_refused():
    registry = registry_of(Unscaled)
    config = parse_config(
        {
            "host": {"name": "moshi", "hf_repo": "builtin:tiny", "dtype": "float32"},
            "ttt": [{"variant": "convolved", "layers": "1", "chunk": 4}],
        },
        registry=registry,
    )
    model = registry.host("moshi").load(config.host)
    injection = inject(model, config, registry=registry)
    injection.set_inner_lr_factor(1.0)
    with pytest.raises(InjectionError, match=r"no effect on layers.1.sequence \(Unscaled\).*scales_inner_lr"):
        injection.set_inner_lr_factor(0.5)
    assert all(block.inner_lr_factor == 1 for block in injection.blocks.values())
