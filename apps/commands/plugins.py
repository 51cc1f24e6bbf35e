"""``moshi-ttt plugins``: list what is installed, and who provides it."""

from __future__ import annotations

import warnings

from moshi_ttt.apps.console import console


def plugins() -> None:
    """List every variant, host, precision policy, format adapter and verifier, and who provides it.

    A plugin that could not be loaded is listed with the reason; it is harmless until a config asks for it.
    """
    from moshi_ttt.apps import plugins as listing
    from moshi_ttt.core.registry import default_registry

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # discovery warns about what the table is about to show
        registry = default_registry()
    console().print(listing.render(registry))
