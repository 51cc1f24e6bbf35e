"""The conformance kit: the rules that every block and every host keeps, as tests for your own.

    from moshi_ttt.testing import conformance_tests

    test_conformance = conformance_tests("my_variant", {"chunk": 4})

This is the public name of ``moshi_ttt.core.testing``.
"""

from moshi_ttt.core.testing import *  # noqa: F403
from moshi_ttt.core.testing import __all__ as __all__
