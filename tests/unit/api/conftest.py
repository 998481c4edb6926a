from collections.abc import AsyncIterator

import httpx
import pytest

from tests.unit.api.fakes import FakeNode, serve_node


@pytest.fixture
def node() -> FakeNode:
    return FakeNode()


@pytest.fixture
async def client(node: FakeNode) -> AsyncIterator[httpx.AsyncClient]:
    async with serve_node(node) as url, httpx.AsyncClient(base_url=url) as client:
        yield client
