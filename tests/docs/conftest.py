from __future__ import annotations

from tests.docs.world import world as world  # a fixture of all tests here
