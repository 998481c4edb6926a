from collections.abc import Iterator

import pytest
from threadpoolctl import threadpool_limits


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    """OpenMP's threads spin while they wait for one another, which on a busy machine takes many times the time."""
    with threadpool_limits(1):
        yield
