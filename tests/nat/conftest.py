"""Whether the lab can be built here."""

import pytest

from tests.support.requirements import unavailable

from .lab import missing, refused


@pytest.fixture(scope="session", autouse=True)
def lab_can_be_built() -> None:
    """Skip the tests where namespaces are not permitted, whatever METASWARM_REQUIRE_ALL says."""
    if (reason := missing()) is not None:
        unavailable(reason)
    if (reason := refused()) is not None:
        pytest.skip(reason)
