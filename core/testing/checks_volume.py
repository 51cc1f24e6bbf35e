"""Checks of the volume: at 0 a block is the base model bit for bit, at 1 the trained block; it updates at each."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moshi_ttt.core.block import SequenceBlock, SiteKind
from moshi_ttt.core.testing.case import BlockCase, assert_close, assert_equal

VOLUMES = (0.0, 0.5, 1.0, 2.0)


def check_volume(case: BlockCase) -> None:
    """What a block adds is multiplied by the volume, by ``output_scale``, and by both; its state depends on neither.

    A number, or one for each row. 0 is bit-equal to the base model, also where what is added is not finite; 1 is
    bit-equal to a call that names no volume.
    """
    block, x = case.block(), case.inputs(2 * case.chunk + 1)
    x[:, 1] = torch.where(x[:, 1] < 0, -0.0, x[:, 1])  # plus anything else, -0 is another number
    assert block.scales_output, (
        f"{type(block).__name__} has no volume: return self.at_volume(base, added, context), and declare "
        "scales_output = True"
    )
    rows = _rows(x)
    with torch.no_grad():
        base = _base(block, x)
        learned, after = case.call(block, x)
        found = {volume: case.call(block, x, volume=volume) for volume in VOLUMES}
        mixed, mixed_after = case.call(block, x, volume=rows)
        ones, _ = case.call(block, x, volume=torch.ones_like(rows))
        assert_equal(ones, learned, "volume 1 for every row")
        for volume, (y, state) in (*found.items(), ("row by row", (mixed, mixed_after))):
            for name, tensor in after.items():
                assert_equal(state[name], tensor, f"volume {volume}, state {name!r}")
            if isinstance(volume, float):
                _check_loudness(block, y, base, learned, volume, case.tolerance, f"volume {volume}")
        for row, volume in enumerate(rows.tolist()):
            what = f"volume {volume} in row {row} alone"
            assert_close(mixed[row], found[volume][0][row], case.tolerance, what)
            if volume == 1:
                assert_equal(mixed[row], learned[row], what)
            _assert_base(mixed[row], base[row], volume, what)
        for scale in (0.0, 0.5):
            scaled = _scaled(case, scale)
            _check_loudness(
                scaled, case.call(scaled, x)[0], base, learned, scale, case.tolerance, f"output_scale {scale}"
            )
            y = case.call(scaled, x, volume=2 * torch.ones_like(rows))[0]
            _check_loudness(
                scaled, y, base, learned, 2 * scale, case.tolerance, f"output_scale {scale} at volume 2 for every row"
            )
        _flood(block)
        _assert_base(case.call(block, x, volume=0.0)[0], base, 0.0, "volume 0, nothing that is added is finite")
        mixed, _ = case.call(block, x, volume=rows)
        _assert_base(mixed[0], base[0], 0.0, "volume 0 in row 0 alone, nothing that is added is finite")


def check_volume_streamed(case: BlockCase) -> None:
    """The volume of a stream can change at each step, for all rows and row by row, and its state does not follow it."""
    if not case.causal:
        return
    block, x = case.block(), case.inputs(3 * case.chunk + 2)
    rows = _rows(x)
    volumes = (0.0, rows, 1.0, torch.zeros_like(rows), torch.ones_like(rows))
    undisturbed, state = block.allocate_state(len(x)), block.allocate_state(len(x))
    for t, token in enumerate(x.split(1, dim=1)):
        volume = volumes[t % len(volumes)]
        learned = case.step(block, token, undisturbed)
        y = case.step(block, token, state, volume=volume)
        with torch.no_grad():
            base = _base(block, token)
        for row in range(len(x)):
            own = volume if isinstance(volume, float) else float(volume[row])
            _assert_base(y[row], base[row], own, f"streamed token {t}, row {row} at volume {own}")
            if own == 1:
                assert_equal(y[row], learned[row], f"streamed token {t}, row {row} at volume 1")
        for name, tensor in undisturbed.items():
            assert_equal(state[name], tensor, f"streamed token {t}, state {name!r}")
    if case.dtype is torch.float64:  # where a step and a call agree closely
        state = block.allocate_state(len(x))
        streamed = torch.cat([case.step(block, token, state, volume=rows) for token in x.split(1, dim=1)], dim=1)
        with torch.no_grad():
            assert_close(streamed, case.call(block, x, volume=rows)[0], case.tolerance, "streamed row by row")


def check_volume_gradient(case: BlockCase) -> None:
    """Gradients of parameters are multiplied by the volume; at 0 they are zero, and that of the input is the base's."""
    block, x = case.block(), case.inputs(2 * case.chunk + 1).requires_grad_()
    weight = case.inputs(x.shape[1], seed=2).double()

    def gradients(y: Tensor) -> dict[str, Tensor]:
        wanted = {"x": x, **dict(block.named_parameters())}
        found = torch.autograd.grad((y.double() * weight).sum(), list(wanted.values()), allow_unused=True)
        return {
            name: torch.zeros_like(tensor) if gradient is None else gradient
            for (name, tensor), gradient in zip(wanted.items(), found, strict=True)
        }

    base = gradients(_base(block, x))
    learned = gradients(case.call(block, x)[0])
    for volume in (0.0, 0.5, torch.zeros(len(x), dtype=block.roles.output)):
        found = gradients(case.call(block, x, volume=volume)[0])
        number = float(torch.as_tensor(volume).flatten()[0])
        for name, gradient in found.items():
            if number and _hears_itself(block):
                continue
            what = f"volume {number}, gradient of {name!r}"
            assert_close(gradient, base[name] + number * (learned[name] - base[name]), case.tolerance, what)
            if not number and name != "x":
                assert not gradient.any(), f"{what} is not zero"


def _rows(x: Tensor) -> Tensor:
    """``[B]``: a volume for each row; 0, 1 and 0.5 in turn."""
    return torch.tensor([(0.0, 1.0, 0.5)[row % 3] for row in range(len(x))])


def _base(block: SequenceBlock, x: Tensor) -> Tensor:
    """``[B, T, D]``: what the base model has in the block's place."""
    if block.kind is SiteKind.SEQUENCE:
        return x
    mlp = block.info.mlp
    assert isinstance(mlp, nn.Module)
    y: Tensor = mlp(x)
    return y


def _scaled(case: BlockCase, scale: float) -> SequenceBlock:
    return case.at(config=case.config.model_copy(update={"output_scale": scale})).block()


def _flood(block: SequenceBlock) -> None:
    """Parameters so large that what is added overflows."""
    for parameter in block.parameters():
        parameter.mul_(torch.finfo(parameter.dtype).max ** 0.75)


def _hears_itself(block: SequenceBlock) -> bool:
    """Whether a second pass reads what the first added: then their sum is not proportional to the volume."""
    return bool(getattr(block.config, "bidirectional", False))


def _check_loudness(
    block: SequenceBlock, y: Tensor, base: Tensor, learned: Tensor, volume: float, tolerance: float, what: str
) -> None:
    """``y`` is ``base + volume * (learned - base)``, and bit-equal to one of them at 0 and 1."""
    _assert_base(y, base, volume, what)
    if volume == 1:
        assert_equal(y, learned, what)
    if not _hears_itself(block):
        expected = base.double() + volume * (learned.double() - base.double())
        assert_close(y, expected.to(y.dtype), tolerance, what)
    elif volume not in (0, 1):
        assert not torch.equal(y, learned), f"{what}: as at volume 1"
        assert not torch.equal(y, base), f"{what}: as at volume 0"


def _assert_base(y: Tensor, base: Tensor, volume: float, what: str) -> None:
    """At volume 0, ``y`` has the bits of ``base``, signs of zeros included; a nan is a nan."""
    if volume:
        return
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[y.element_size()]
    same = (y.contiguous().view(integer) == base.contiguous().view(integer)) | (y.isnan() & base.isnan())
    assert bool(same.all()), f"{what}: {int((~same).sum())} of {same.numel()} numbers are not the base model's"
