"""What a test needs and not every machine has."""

import os
from typing import NoReturn

import pytest


def unavailable(reason: str) -> NoReturn:
    """Skip the test, or fail it where METASWARM_REQUIRE_ALL says that everything has to be here."""
    if os.environ.get("METASWARM_REQUIRE_ALL"):
        pytest.fail(f"METASWARM_REQUIRE_ALL is set, and {reason}")
    pytest.skip(reason)
