"""The built-in precision policies and format adapters, registered by the same hooks as everyone's."""

from __future__ import annotations

from moshi_ttt.core.format import GridFormat, SequenceFormat
from moshi_ttt.core.hooks import hookimpl
from moshi_ttt.core.precision import FP32, FP32_STATE, UNIFORM
from moshi_ttt.core.registrar import Registrar

MOSHI_TTT_API = 1


@hookimpl
def moshi_ttt_precision_policies(registrar: Registrar) -> None:
    for policy in (FP32_STATE, UNIFORM, FP32):
        registrar.add(policy.name, policy)


@hookimpl
def moshi_ttt_format_adapters(registrar: Registrar) -> None:
    registrar.add("sequence", SequenceFormat())
    registrar.add("grid", GridFormat())
