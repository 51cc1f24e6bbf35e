"""Inner losses during a run: by native keys and by those of the flat block, without changing what is trained."""

from __future__ import annotations

import pytest
from rich.console import Console

from moshi_ttt import default_registry
from moshi_ttt.configs.settings import parse_settings
from moshi_ttt.core.errors import ConfigError
from moshi_ttt.training import run as running

from .conftest import FRAMES, LORA, adapter, records, same, values

pytestmark = pytest.mark.each_kind

BLOCKS = [{"variant": "ttt_mlp", "layers": "1", "chunk": 4}, {"variant": "gating_mlp", "layers": "2", "chunk": 4}]


@pytest.mark.first_by_default
@pytest.mark.parametrize("changes", [{}, {"carry_state": True, "num_microbatches": 2, "gradient_checkpointing": True}])
def test_inner_losses_are_logged_by_position_and_change_nothing(train, tmp_path, changes):
    plain = train(run_dir=str(tmp_path / "plain"), ttt=BLOCKS, max_steps=4, **changes)
    watched = train(
        run_dir=str(tmp_path / "run"), ttt=BLOCKS, max_steps=4, inner_losses={"enable": True, "interval": 2}, **changes
    )
    assert same(adapter(plain.checkpoint), adapter(watched.checkpoint))
    assert [r["loss"] for r in records(tmp_path / "plain")] == [r["loss"] for r in records(tmp_path / "run")]
    lines = records(tmp_path / "run", "inner_losses")
    assert [line["step"] for line in lines] == [2, 4]
    for line in lines:
        assert set(line["blocks"]) == {"layers.1.sequence", "layers.2.feed_forward"}
        found = line["blocks"]["layers.1.sequence"]
        assert found["first_updated_position"] == 4
        rows = 2 * changes.get("num_microbatches", 1)
        assert found["tokens"] == rows * (FRAMES - 4), "a call that checkpointing repeats is measured once"
        assert set(found["mean"]) == {"initial", "before", "after", "baseline"}
        assert found["mean"]["after"] < found["mean"]["before"], "an update lowers the loss it was made for"
        position = found["by_position"]
        assert position["before"][:4] == position["initial"][:4]
        assert FRAMES <= sum(value is not None for value in position["initial"]) <= FRAMES + 1
    assert not (tmp_path / "run" / "inner_losses").exists()


@pytest.mark.first_by_default
@pytest.mark.parametrize("folder", [None, "plots"])
def test_plots_are_drawn_where_they_are_asked_for(train, tmp_path, folder):
    where = {"plot_dir": str(tmp_path / folder)} if folder else {}
    train(ttt=BLOCKS, max_steps=2, inner_losses={"plots": True, "interval": 1, **where})
    drawn = sorted((tmp_path / folder if folder else tmp_path / "run" / "inner_losses").iterdir())
    assert [path.name for path in drawn] == [
        f"step_{step:06d}_{site}.png" for step in (1, 2) for site in ("layers.1.sequence", "layers.2.feed_forward")
    ]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in drawn)


FLAT = {
    "enable": True, "layers": "1", "ttt_mlp_layers": 1, "mini_batch_size": 4, "base_lr": 1.0,
    "log_inner_loop_losses": True, "inner_loop_log_interval": 2, "save_inner_loop_plots": True,
}  # fmt: skip


def test_the_flat_blocks_keys_are_obeyed(train, tmp_path):
    with pytest.warns(UserWarning, match=r"reads it as inner_losses\.interval"):
        train(ttt={**FLAT, "inner_loop_plot_dir": str(tmp_path / "figures"), "persistent_states": True}, max_steps=3)
    assert [line["step"] for line in records(tmp_path / "run", "inner_losses")] == [2, 3], "the last step too"
    assert sorted(path.name for path in (tmp_path / "figures").iterdir()) == [
        f"step_{step:06d}_layers.1.sequence.png" for step in (2, 3)
    ]


@pytest.mark.filterwarnings("ignore:.*the flat ttt block is read as")
def test_what_the_run_says_itself_counts(encoded, tmp_path):
    def parse(flat, **changes):
        chosen = {**values(encoded, tmp_path / "run"), "ttt": {**FLAT, **flat}, **changes}
        return parse_settings(chosen, registry=default_registry(), where="c.yaml").run

    options = parse({}, inner_losses={"interval": 5}).inner_losses
    assert (options.enable, options.interval, options.plots) == (True, 5, True)
    assert parse({"log_inner_loop_losses": False, "ttt_fig5_enable": True}).inner_losses.enable
    assert not parse({"enable": False, "persistent_states": True}, lora=LORA).carry_state
    assert not parse({"log_inner_loop_losses": False, "save_inner_loop_plots": False}).inner_losses.wanted


def test_a_plot_that_cannot_be_written_is_a_warning(settings, tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    chosen = settings(
        ttt=BLOCKS, max_steps=2, inner_losses={"plots": True, "interval": 1, "plot_dir": str(tmp_path / "file" / "x")}
    )
    assert running.run(chosen, default_registry(), Console(width=500)).step == 2
    assert "Warning: the inner losses of step 1 cannot be drawn in" in capsys.readouterr().out
    assert len(records(tmp_path / "run", "inner_losses")) == 2


@pytest.mark.exhaustive  # pictures, for seconds
def test_a_folder_with_plots_is_the_runs_own(train, tmp_path):
    changes = {"ttt": BLOCKS, "inner_losses": {"plots": True, "interval": 1}}
    train(max_steps=1, **changes)
    assert train(max_steps=2, resume=True, **changes).step == 2
    assert train(max_steps=1, overwrite_run_dir=True, **changes).step == 1
    assert {path.name[:11] for path in (tmp_path / "run" / "inner_losses").iterdir()} == {"step_000001"}


@pytest.mark.parametrize("wrong", [{"interval": 0}, {"every": 3}, {"plot_dir": ""}])
def test_what_makes_no_sense_is_refused(settings, wrong):
    with pytest.raises(ConfigError, match="inner_losses"):
        settings(inner_losses=wrong)
