"""The hook API that plugins implement: pluggy hooks, one per extension point.

A plugin is a module or object named by an entry point in the group ``moshi_ttt``. It declares the major version of this
API that it was written for (``MOSHI_TTT_API = 1``) and implements any of the hooks below::

    from moshi_ttt.core.hooks import hookimpl

    MOSHI_TTT_API = 1

    @hookimpl
    def moshi_ttt_blocks(registrar):
        registrar.add("my_variant", config="my_package.config:MyConfig", block="my_package.block:MyBlock")

The registrar is bound to the plugin that is called, so every name knows its distribution and version.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from moshi_ttt.core.registrar import BlockRegistrar, Registrar

ENTRY_POINT_GROUP = "moshi_ttt"
HOOK_API_VERSION = 1
"""Major version. It grows when a hook changes in a way that breaks a plugin."""

hookspec = pluggy.HookspecMarker("moshi_ttt")
hookimpl = pluggy.HookimplMarker("moshi_ttt")


class HookSpecs:
    """All hooks. Each gets a registrar. Targets are objects, or ``"module:attribute"`` strings imported when used."""

    @hookspec
    def moshi_ttt_blocks(self, registrar: BlockRegistrar) -> None:
        """Register variants: ``registrar.add(name, config=..., block=...)``."""

    @hookspec
    def moshi_ttt_format_adapters(self, registrar: Registrar) -> None:
        """Register format adapters: ``registrar.add(name, target)``, target a ``FormatAdapter`` instance."""

    @hookspec
    def moshi_ttt_precision_policies(self, registrar: Registrar) -> None:
        """Register precision policies: ``registrar.add(name, target)``, target a ``PrecisionPolicy``."""

    @hookspec
    def moshi_ttt_hosts(self, registrar: Registrar) -> None:
        """Register hosts: ``registrar.add(name, target)``, target a ``HostModel`` instance."""

    @hookspec
    def moshi_ttt_verifiers(self, registrar: Registrar) -> None:
        """Register forms that reference vectors are checked against: ``registrar.add(name, target)``, a ``Verifier``.

        A hook, and not a list in ``moshi-ttt verify``: that command imports no variant, and checks a third party's too.
        """

    @hookspec
    def moshi_ttt_weight_maps(self, registrar: Registrar) -> None:
        """Register layouts of a block's weights: ``registrar.add(name, target)``, target a ``WeightMap`` instance.

        A hook, because the other implementation's names belong to the variant, and callers know both by name alone.
        """

    @hookspec
    def moshi_ttt_accelerations(self, registrar: Registrar) -> None:
        """Register reports on faster forms: ``registrar.add(variant, target)``, target ``() -> (Acceleration, ...)``.

        A hook, because ``moshi-ttt info`` imports no variant, and reports on a third party's too.
        """
