"""Strategies for what the fuzz draws. They shrink towards one row, one head, one token, default options."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy

from tests.fuzz.cases import (
    Call,
    CompileStep,
    Configuration,
    HostCall,
    HostSchedule,
    Layer,
    NewCarry,
    Reload,
    Reset,
    Schedule,
    Spoiled,
)

HEADS = st.integers(1, 3)
WIDTHS = st.sampled_from([4, 2, 6, 8])
"""Of a head. RoPE needs an even one."""
WIDTHS_OF = {"float64": WIDTHS, "float32": st.sampled_from([16, 8])}
"""In float32 a LayerNorm over less rounds too much for any bound of use."""
SEEDS = st.integers(0, 2**16 - 1)
SIZES = st.integers(1, 9)
BOOLS = st.booleans()


@st.composite
def hybrid_layers(
    draw: DrawFn, *, causal: bool = False, heads: SearchStrategy[int] = HEADS, head_width: SearchStrategy[int] = WIDTHS
) -> Layer:
    """ttt_linear, ttt_mlp or ttt_multilayer with any options; ``causal`` leaves out what is not."""
    options: dict[str, Any] = {"variant": draw(st.sampled_from(["ttt_linear", "ttt_mlp", "ttt_multilayer"]))}
    options["chunk"] = draw(st.integers(1, 6))
    options["base_lr"] = draw(st.sampled_from([1.0, 0.1, 0.3, 2.0]))
    if options["variant"] == "ttt_mlp":
        options["expansion"] = draw(st.integers(1, 4))
    elif options["variant"] == "ttt_multilayer":
        options |= draw(
            st.one_of(
                st.fixed_dictionaries({"hidden_dims": st.lists(st.integers(1, 9), max_size=3)}),
                st.fixed_dictionaries({"depth": st.integers(1, 4), "expansion": st.integers(1, 3)}),
            )
        )
    direction = "causal" if causal else draw(st.sampled_from(["causal", "whole chunk", "both ways"]))
    if direction == "whole chunk":
        options["causal"] = False
    elif direction == "both ways":
        options["bidirectional"] = True
    if draw(BOOLS):
        init = draw(st.sampled_from([0.05, 0.0, 0.5, 1.0]))
        options["gate"] = {"alpha": draw(st.sampled_from(["channel", "layer", "fixed"])), "init": init}
    if draw(BOOLS):
        options["rope_theta"] = draw(st.sampled_from([10_000.0, 100.0, 1.5]))
        options["norm_eps"] = draw(st.sampled_from([1e-6, 1e-4, 1e-2]))
        options["target_eps"] = draw(st.sampled_from([1e-8, 1e-5, 1e-2]))
        options["post_norm_eps"] = draw(st.sampled_from([1e-6, 1e-3, 1e-1]))
    count, spread, head = draw(heads), draw(st.sampled_from([1.0, 0.3, 0.1])), draw(head_width)
    options |= draw(memory_options(options["base_lr"] <= head and "norm_eps" not in options))
    return Layer(options=options, width=count * head, heads=count, spread=spread, seed=draw(SEEDS))


@st.composite
def memory_options(draw: DrawFn, without_norm: bool) -> dict[str, Any]:
    """What changes keys, values and updates of a hybrid layer: often none, often several."""
    options: dict[str, Any] = {}
    if draw(BOOLS):
        return options
    if draw(BOOLS):
        options["conv_kernel"] = draw(st.integers(2, 5))
    if draw(BOOLS):
        options["value"] = "embedding"
    if without_norm and draw(BOOLS):
        options["inner_norm"] = False
    if draw(BOOLS):
        options["inner_steps"] = draw(st.integers(2, 3))
    momentum = draw(st.sampled_from(["none", "fixed", "learned"]))
    if momentum == "fixed":
        options["momentum"] = draw(st.sampled_from([0.9, 0.5, 0.0]))
    elif momentum == "learned":
        options["learned_momentum"] = True
    return options


@st.composite
def corrections(draw: DrawFn, chunk: int, padding: str, kernel: int) -> dict[str, Any]:
    """What gating_mlp has beside the published form."""
    options: dict[str, Any] = {"update": draw(st.sampled_from(["ridge", "gradient", "hebbian"]))}
    options["keys"] = draw(st.sampled_from(["unit", "raw"]))
    options["target_norm"] = draw(BOOLS)
    options["success_gate"] = draw(BOOLS)
    options["read_scale"] = draw(st.sampled_from([1.0, 8.0, 0.5]))
    if chunk > 1 and kernel > 1 and padding == "centered":
        options["start"] = draw(st.sampled_from(["published", "next_frame"]))
    return options


@st.composite
def in_place_layers(
    draw: DrawFn, *, width: SearchStrategy[int] = SIZES, hidden: SearchStrategy[int] = SIZES, published: bool = False
) -> Layer:
    """gating_mlp with any options, odd widths included."""
    options: dict[str, Any] = {"variant": "gating_mlp", "chunk": draw(st.integers(1, 13))}
    options["conv_kernel"] = draw(st.integers(1, 7))
    options["padding"] = draw(st.sampled_from(["centered", "causal"]))
    options["target"] = draw(st.sampled_from(["input_embed", "hidden_states"]))
    options["lr"] = draw(st.sampled_from([0.3, 0.05, 1.0]))
    if draw(BOOLS):
        options["learned_lr"] = True
    if not published and draw(BOOLS):
        options |= draw(corrections(options["chunk"], options["padding"], options["conv_kernel"]))
        if options["update"] == "gradient":
            options["lr"] = 0.05  # with a larger one and like keys it diverges, and no bound is of use
    if draw(BOOLS):
        options["decay"] = draw(st.sampled_from([0.1, 0.5, 0.9]))
    if draw(BOOLS):
        options["clip"] = draw(st.sampled_from([1.0, 0.1, 5.0]))
    if draw(BOOLS):
        options["train_w_down"] = True
    return Layer(options=options, width=draw(width), hidden=draw(hidden), seed=draw(SEEDS))


@st.composite
def ridge_layers(draw: DrawFn, *, width: SearchStrategy[int] | None = None) -> Layer:
    """ttt_ridge with any options, odd widths included."""
    heads = draw(st.integers(1, 3))
    options: dict[str, Any] = {"variant": "ttt_ridge", "chunk": draw(st.integers(1, 6)), "heads": heads}
    total = draw(width) if width is not None else heads * draw(st.integers(1, 6))
    if total % heads or draw(BOOLS):
        options |= {"key_width": draw(st.integers(1, 8)), "value_width": draw(st.integers(1, 5))}
    if draw(BOOLS):
        options["features"] = "relu2"
    options["conv_kernel"] = draw(st.integers(2, 5))
    options["value"] = draw(st.sampled_from(["embedding", "hidden"]))
    options |= {name: draw(BOOLS) for name in ("novelty", "success_gate", "variance_gate")}
    if draw(BOOLS):
        options["decay"] = draw(st.sampled_from([0.1, 0.5, 0.01]))
    if draw(BOOLS):
        options["readout_scale"] = draw(st.sampled_from([1.0, 8.0, 0.5]))
    if draw(BOOLS):
        init = draw(st.sampled_from([0.05, 0.5, 1.0]))
        options["gate"] = {"alpha": draw(st.sampled_from(["channel", "layer", "fixed"])), "init": init}
    return Layer(options=options, width=total, seed=draw(SEEDS))


def layers() -> SearchStrategy[Layer]:
    return st.one_of(in_place_layers(), hybrid_layers(), ridge_layers())


@st.composite
def configurations(draw: DrawFn, layers: SearchStrategy[Layer] = layers()) -> Configuration:  # noqa: B008
    layer = draw(layers)
    chunk = layer.option["chunk"]
    length = draw(st.integers(1, min(3 * chunk + 2, 28 if layer.in_place else 16)))
    batch = draw(st.integers(1, 4))
    learns = draw(st.just((True,) * batch) | st.tuples(*[BOOLS] * batch))
    changed = draw(st.integers(1, max(1, length - 1)))
    return Configuration(layer=layer, learns=learns, length=length, changed=changed, seed=draw(SEEDS))


@st.composite
def cancelling_layers(draw: DrawFn) -> Layer:
    """gating_mlp with an even chunk and a clip that is smaller than what alternating targets leave."""
    options = {"variant": "gating_mlp", "chunk": 2 * draw(st.integers(1, 16)), "conv_kernel": 1}
    options["clip"] = draw(st.sampled_from([1e-6, 1e-3]))
    return Layer(options=options, width=draw(st.integers(2, 9)), hidden=draw(st.integers(2, 9)), seed=draw(SEEDS))


NOISES = st.sampled_from([1e-2, 1e-4])


@st.composite
def cancelling_configurations(draw: DrawFn) -> Configuration:
    """Nearly equal keys and alternating targets: the norm of a small difference of large sums."""
    layer, alternating = draw(cancelling_layers()), draw(NOISES)
    length = layer.option["chunk"] + draw(st.integers(1, 3))
    return Configuration(
        layer=layer, learns=(True,), length=length, changed=1, alternating=alternating, seed=draw(SEEDS)
    )


@st.composite
def cancelling_schedules(draw: DrawFn) -> Schedule:
    """The same in a stream, by the compiled step or not."""
    layer, alternating = draw(cancelling_layers()), draw(NOISES)
    begin = (CompileStep(),) if draw(BOOLS) else ()
    steps = (Call(1),) * (layer.option["chunk"] + 1)
    return Schedule(layer=layer, batch=1, events=(*begin, *steps), alternating=alternating, seed=draw(SEEDS))


@st.composite
def spoiled_tokens(draw: DrawFn) -> Spoiled:
    dtype = draw(st.sampled_from(["float64", "float32"]))
    layer = draw(st.one_of(in_place_layers(), hybrid_layers(head_width=WIDTHS_OF[dtype]), ridge_layers()))
    chunk, batch = layer.option["chunk"], draw(st.integers(2, 3))
    length = draw(st.integers(1, 2 * chunk + 2))
    return Spoiled(
        layer=layer,
        value=draw(st.sampled_from(["nan", "inf", "-inf", "1e30"])),
        batch=batch,
        length=length,
        row=draw(st.integers(0, batch - 1)),
        token=draw(st.integers(0, length - 1)),
        steps=layer.causal and draw(BOOLS),
        dtype=dtype,
        seed=draw(SEEDS),
    )


def calls(batch: int, chunk: int) -> SearchStrategy[Call]:
    """One token more often than many; masks, resets and switched-off updates in some of them."""
    rows = st.tuples(*[BOOLS] * batch)
    return st.builds(
        Call,
        tokens=st.one_of(st.just(1), st.just(1), st.integers(1, 2 * chunk + 1)),
        runs=st.none() | rows,
        resets=st.none() | st.none() | rows,
        learns=st.one_of(st.just(True), rows, BOOLS),
        in_place=st.sampled_from([True, True, False]),
    )


@st.composite
def schedules(draw: DrawFn, layers: SearchStrategy[Layer] | None = None, *, hybrid: bool = False) -> Schedule:
    """Of any causal layer, or of a ``hybrid`` one alone, or of ``layers``."""
    dtype, batch = draw(st.sampled_from(["float64", "float64", "float32"])), draw(st.integers(1, 4))
    kinds = [hybrid_layers(causal=True, head_width=WIDTHS_OF[dtype])]
    if layers is None:
        layers = st.one_of(*kinds, *([] if hybrid else [in_place_layers(), ridge_layers()]))
    layer = draw(layers)
    others = [st.builds(Reset, rows=st.tuples(*[BOOLS] * batch)), st.builds(Reload)]
    others += [st.builds(CompileStep)] if layer.in_place else []
    events = _several(draw, calls(batch, layer.option["chunk"]), others)
    return Schedule(layer=layer, batch=batch, events=events, dtype=dtype, seed=draw(SEEDS))


@st.composite
def host_schedules(draw: DrawFn) -> HostSchedule:
    """One to three layers of a model, each with no block, one, or one at each of its sites."""
    heads, head, batch = draw(st.integers(1, 2)), draw(st.sampled_from([4, 6])), draw(st.integers(1, 3))
    width = heads * head
    hybrid = hybrid_layers(causal=True, heads=st.just(heads), head_width=st.just(head))
    sequence = st.one_of(hybrid, hybrid, ridge_layers(width=st.just(width)))
    feed_forward = in_place_layers(width=st.just(width), hidden=st.just(2 * width))
    either = st.tuples(st.none() | sequence, st.none() | feed_forward)
    blocks = draw(st.lists(either, min_size=1, max_size=3).filter(lambda layers: any(any(pair) for pair in layers)))
    rows = st.tuples(*[BOOLS] * batch)
    call = st.builds(HostCall, tokens=st.just(1) | st.integers(1, 9), learns=st.one_of(st.just(True), rows, BOOLS))
    events = _several(draw, call, [st.builds(Reset, rows=rows), st.builds(NewCarry)])
    return HostSchedule(blocks=tuple(blocks), width=width, heads=heads, batch=batch, events=events, seed=draw(SEEDS))


def _several(draw: DrawFn, call: SearchStrategy[Any], others: list[SearchStrategy[Any]]) -> tuple[Any, ...]:
    """Events of a schedule, three of four of them calls."""
    kinds = st.sampled_from([call] * 3 * len(others) + others)
    length = draw(st.integers(1, 24))
    return tuple(draw(draw(kinds)) for _ in range(length))
