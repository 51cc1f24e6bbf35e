"""Bugs planted into the stream and the corrections of ``gating_mlp``, for every suite that must find them."""

from __future__ import annotations

import pytest

from moshi_ttt.plugins.gating_mlp.corrections import Unfinished
from moshi_ttt.plugins.gating_mlp.recurrent import Stepper


def a_chunk_that_goes_on_forgets_its_factor(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Unfinished, "before_the_solution", lambda self, keys, errors: (keys, errors))


def a_stream_solves_with_less_ridge(patch: pytest.MonkeyPatch) -> None:
    solve = Stepper._solve

    def mutated(self, state, key, errors, ridge, *others):
        return solve(self, state, key, errors, 0.9 * ridge, *others)

    patch.setattr(Stepper, "_solve", mutated)


def a_stream_folds_without_decay(patch: pytest.MonkeyPatch) -> None:
    fold = Stepper._fold

    def mutated(self, delta, channels, slices, forgotten):
        return fold(self, delta, channels, slices, None)

    patch.setattr(Stepper, "_fold", mutated)
