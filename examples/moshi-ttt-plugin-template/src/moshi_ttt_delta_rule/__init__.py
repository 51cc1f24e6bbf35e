"""The variant ``delta_rule``: registers itself, imports nothing until it is used."""

from __future__ import annotations

from moshi_ttt.core.hooks import hookimpl

MOSHI_TTT_API = 1


@hookimpl
def moshi_ttt_blocks(registrar):
    registrar.add("delta_rule", config=f"{__name__}.config:DeltaRuleConfig", block=f"{__name__}.block:DeltaRule")
