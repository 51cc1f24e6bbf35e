"""The lines of a log."""

from __future__ import annotations

import math

from moshi_ttt.core.losses import LossMeans
from moshi_ttt.training.logs import eval_line, loss_record


def test_a_loss_without_tokens_is_not_in_the_line_of_an_evaluation() -> None:
    """As of text, where there are no transcripts."""
    losses = LossMeans(
        means={"text": 0.0, "audio": 1.5}, plain={"text": math.nan, "audio": 1.5}, total=1.5, terms=8, in_nats=True
    )
    record = {"step": 3, **loss_record(losses)}
    assert record["nats_text"] is None
    assert eval_line(record, losses) == "held out after step 3: audio 1.5000 nats/token (perplexity 4.5), 8 tokens"


def test_an_evaluation_without_any_token_says_so() -> None:
    losses = LossMeans(means={"audio": 0.0}, plain={"audio": math.nan}, total=0.0, terms=0, in_nats=True)
    assert (
        eval_line({"step": 3, **loss_record(losses)}, losses) == "held out after step 3: nothing to predict, 0 tokens"
    )
