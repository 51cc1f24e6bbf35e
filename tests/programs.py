"""The programs of ``scripts/`` as modules, for their tests."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType

from tests.project import ROOT

SCRIPTS = ROOT / "scripts"


def load_script(name: str) -> ModuleType:
    """``scripts/NAME.py``, run as a module of that name. What it imports from its own folder is found."""
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # scripts import each other by these names, and dataclasses look their module up
    sys.path.insert(0, str(SCRIPTS))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(SCRIPTS))
    return module
