"""Inner-loop curves: averages over recordings of any length, what is refused, what is written, nothing is changed."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from moshi_ttt import default_registry, inject, parse_config
from moshi_ttt.core.block import BlockContext, SequenceBlock
from moshi_ttt.core.errors import ConfigError
from moshi_ttt.core.inner_losses import CURVES
from moshi_ttt.evaluation.inner_loop import evaluate, write_inner_loop
from moshi_ttt.evaluation.models import ModelUnderTest
from moshi_ttt.hosts.moshi.losses import delayed
from moshi_ttt.hosts.moshi.tiny import FEW_CODEBOOKS, random_tiny_lm
from moshi_ttt.system.report.inner_losses import running_mean

from .conftest import CONTEXT, LAYERS, document, model_with

pytestmark = pytest.mark.each_kind

VARIANTS = ["ttt_linear", "ttt_mlp", "ttt_multilayer", "ttt_ridge", "gating_mlp"]


def run(tested, documents, **changes):
    return evaluate(tested, documents, **{"batch_size": 2, "smooth": 3, **changes})


def direct(tested, codes):
    """The losses of one recording ``[Q, T]``, from what its only block is called with."""
    ((_, block),) = tested.injection.blocks.items()
    losses_of = []
    hook = block.register_forward_hook(
        lambda block, args, kwargs, output: losses_of.append((args[0], args[2])), with_kwargs=True
    )
    with torch.no_grad():
        tested.model.forward_text(delayed(tested.model, codes[None])[:, :, :-1])
    hook.remove()
    ((x, context),) = losses_of
    assert x.shape[1] == codes.shape[1]
    return {name: loss[0].double() for name, loss in block.inner_losses(x, context).items()}


@pytest.mark.parametrize("variant", VARIANTS)
def test_means_are_over_the_recordings_that_have_a_value(variant):
    tested = model_with(variant)
    documents = [document(18, 0), document(13, 1), document(18, 2)]
    result = run(tested, documents)
    alone = [direct(tested, each.codes) for each in documents]
    (site,) = result.sites
    assert (site.variant, site.first_updated, result.frames, site.not_finite) == (variant, 4, 18, 0)
    assert site.tokens == (16 - 4) + (12 - 4) + (16 - 4)
    for name in CURVES:
        curve = site.by_position[name]
        padded = [torch.nn.functional.pad(one[name], (0, 18 - one[name].shape[1]), value=torch.nan) for one in alone]
        expected = torch.stack(padded).nanmean(0)
        assert curve.shape == expected.shape
        torch.testing.assert_close(curve, expected, rtol=1e-4, atol=1e-6, equal_nan=True)
        tokens = torch.cat([one[name][:, 4 : one[name].shape[1] // 4 * 4] for one in alone], dim=1)
        torch.testing.assert_close(site.means[name], tokens.mean(1), rtol=1e-4, atol=1e-6)
    assert torch.equal(site.by_position["initial"][:, :4], site.by_position["before"][:, :4])
    assert not (site.by_position["initial"][:, 4:] == site.by_position["before"][:, 4:]).any()
    assert site.by_position["after"][:, 16:].isnan().all()


def test_two_blocks_in_one_layer_have_curves_each():
    model = random_tiny_lm(context=CONTEXT, num_layers=LAYERS, **FEW_CODEBOOKS)
    entries = [{"variant": variant, "layers": "1", "chunk": 4} for variant in ("gating_mlp", "ttt_linear")]
    config = {"host": {"name": "moshi", "hf_repo": "builtin:tiny"}, "ttt": entries}
    injection = inject(model, parse_config(config, registry=default_registry()))
    tested = ModelUnderTest(name="both", model=model, injection=injection, facts={})
    result = run(tested, [document(12, 0)])
    assert {site.site: site.variant for site in result.sites} == {
        "layers.1.sequence": "ttt_linear", "layers.1.feed_forward": "gating_mlp",
    }  # fmt: skip


def test_a_padded_recording_is_never_used():
    tested, seen = model_with("ttt_linear"), []
    ((_, block),) = tested.injection.blocks.items()
    hook = block.register_forward_hook(lambda block, args, output: seen.append(tuple(args[0].shape[:2])))
    run(tested, [document(frames, seed) for seed, frames in enumerate((9, 12, 9, 9, 12))])
    hook.remove()
    assert seen == [(2, 12), (2, 9), (1, 9)]


def test_an_update_lowers_the_loss_of_what_it_saw():
    (site,) = run(model_with("ttt_mlp", base_lr=1.0), [document(40, 0)]).sites
    assert (site.means["after"] < site.means["before"]).all()


def test_the_model_is_as_it_was():
    tested = model_with("gating_mlp")
    ((_, block),) = tested.injection.blocks.items()
    before = {name: tensor.clone() for name, tensor in tested.model.state_dict().items()}
    hooks, random = dict(block._forward_hooks), torch.get_rng_state()
    run(tested, [document(12, 0)])
    assert all(torch.equal(before[name], tensor) for name, tensor in tested.model.state_dict().items())
    assert dict(block._forward_hooks) == hooks
    assert torch.equal(torch.get_rng_state(), random)
    with pytest.raises(IndexError):
        run(tested, [replace(document(12, 0), codes=torch.full((5, 12), 10**6))])
    assert dict(block._forward_hooks) == hooks


def test_what_cannot_be_measured_is_refused(base, monkeypatch):
    tested = model_with("ttt_linear")
    with pytest.raises(ConfigError, match=r"base has no blocks.*Give an adapter"):
        run(base, [document(12, 0)])
    with pytest.raises(ConfigError, match="no recordings"):
        run(tested, [])
    with pytest.raises(ConfigError, match=r"None of 2 recordings has a whole chunk .* 3 frames.*max-seconds"):
        run(tested, [document(3, 0), document(2, 1)])
    with pytest.raises(ConfigError, match="batch_size 0: give 1 or more"):
        run(tested, [document(12, 0)], batch_size=0)
    with pytest.raises(ConfigError, match="smooth -1: give 1 or more"):
        run(tested, [document(12, 0)], smooth=-1)
    ((_, block),) = tested.injection.blocks.items()
    monkeypatch.setattr(type(block), "inner_losses", SequenceBlock.inner_losses)
    assert block.inner_losses(torch.zeros(1), BlockContext()) == {}
    with pytest.raises(ConfigError, match=r"\(ttt_linear\) have no inner loss"):
        run(tested, [document(12, 0)])


def test_losses_that_are_no_numbers_are_counted(tmp_path):
    tested = model_with("ttt_linear")
    with torch.no_grad():
        next(iter(tested.injection.blocks.values())).norm_weight.fill_(1e30)  # its squares are beyond float32
    result = run(tested, [document(16, 0)])
    (site,) = result.sites
    assert site.not_finite > 0
    write_inner_loop(tmp_path, result, made_by="test", frame_seconds=0.08)
    assert f"**{site.not_finite} losses are not finite" in (tmp_path / "report.md").read_text()


def test_the_running_mean_leaves_out_what_is_missing():
    values = torch.tensor([1.0, 2.0, torch.nan, 5.0, 6.0])
    expected = torch.tensor([1.5, 1.5, torch.nan, 5.5, 5.5], dtype=torch.float64)
    torch.testing.assert_close(running_mean(values, 3), expected, equal_nan=True)
    torch.testing.assert_close(running_mean(values, 1), values.double(), equal_nan=True)
    assert running_mean(values, 100)[0] == 3.5


@pytest.mark.parametrize("variant", ["ttt_linear", "gating_mlp"])
def test_a_report_has_every_curve(variant, tmp_path):
    result = run(model_with(variant), [document(18, 0), document(18, 1)])
    result.facts["data"] = "talks"
    write_inner_loop(tmp_path, result, made_by="test", frame_seconds=0.08)
    metrics = json.loads((tmp_path / "metrics.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    (site,) = metrics["sites"]
    name, (curves,) = site["site"], result.sites
    assert (metrics["made_by"], metrics["smooth_frames"], site["first_updated_position"]) == ("test", 3, 4)
    assert site["mean_of_heads_by_position"]["after"][16:] == [None, None]
    assert len(site["mean_by_head"]["before"]) == len(curves.means["before"])
    assert (tmp_path / f"{name}.png").stat().st_size > 1000
    tensors = load_file(tmp_path / "curves.safetensors")
    assert sorted(tensors) == sorted(f"{name}.{curve}" for curve in CURVES)
    torch.testing.assert_close(tensors[f"{name}.before"], curves.by_position["before"].float())
    report = (tmp_path / "report.md").read_text()
    assert "- data: talks" in report
    assert f"![{name}]({name}.png)" in report
    change = curves.means["after"] - curves.means["before"]
    assert f"| {float(change[0]):.5g} |" in report


def test_a_recording_of_one_chunk_has_nothing_to_average(tmp_path):
    result = run(model_with("ttt_linear"), [document(4, 0)])
    assert (result.sites[0].first_updated, result.sites[0].tokens) == (4, 0)
    write_inner_loop(tmp_path, result, made_by="test", frame_seconds=0.08)
    assert "No update took effect" in (tmp_path / "report.md").read_text()
    assert json.loads((tmp_path / "metrics.json").read_text())["sites"][0]["mean_by_head"]["before"][0] is None
