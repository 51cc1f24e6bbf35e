"""What several plugins share, except the TTT layer (``plugins.hybrid``). A library: it registers nothing."""

from pathlib import Path

# The earlier names of what is now in plugins.hybrid are modules of this package for one version (moved/__init__.py).
__path__ = [*__path__, str(Path(__file__).parent / "moved")]
