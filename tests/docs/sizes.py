"""What is added to the commands of the documents, so that they run in seconds: fewer steps, less speech."""

from __future__ import annotations

TRAIN = [
    "max_steps=2", "batch_size=1", "duration_sec=4", "ckpt_freq=1", "eval_freq=2", "log_health=false", "device=cpu",
]  # fmt: skip
SMALL: tuple[tuple[tuple[str, ...], list[str]], ...] = (
    (("moshi-ttt", "train"), TRAIN),
    (("moshi-ttt", "encode"), ["duration_sec=4"]),
    (("moshi-ttt", "quickstart"), ["--steps", "1"]),
    (("moshi-ttt", "evaluate", "long-context"), ["--max-seconds", "12"]),
    (("moshi-ttt", "evaluate", "inner-loop"), ["--max-seconds", "8"]),
    (("moshi-ttt", "doctor"), ["--batches", "1"]),
)
"""The first words of a command, and what is added at its end. The last value of an option counts."""
SHORTER = {"0,0.25,0.5,1": "0.5"}
"""Values that are replaced: each volume streams every clip again."""
WHOLE = ("--plan",)
"""Options of commands that take no time: nothing is added."""


def at_small_size(words: list[str]) -> list[str]:
    """A command with what ``SMALL`` adds to it."""
    words = [SHORTER.get(word, word) for word in words]
    if any(option in words for option in WHOLE):
        return words
    for start, added in SMALL:
        if tuple(words[: len(start)]) == start:
            return [*words, *added]
    return words
