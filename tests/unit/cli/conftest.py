import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import trio

from tests.unit.api.fakes import FakeNode, serve_node


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """The user's own node and settings have no say in a test."""
    for name in ("API", "API_KEY", "CONFIG", "BOOTSTRAP", "SERVE", "SWARM_KEY", "LISTEN"):
        monkeypatch.delenv(f"METASWARM_{name}", raising=False)
    monkeypatch.setenv("METASWARM_DATA_DIR", str(tmp_path_factory.mktemp("data")))
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.setenv("NO_COLOR", "1")


ServeNode = Callable[..., str]


@pytest.fixture
def serve(request: pytest.FixtureRequest) -> ServeNode:
    """Serve fake nodes in a thread of their own, as another process would; give each one's URL."""

    def start(node: FakeNode, api_key: str | None = None) -> str:
        context = _served(node, api_key)
        url = context.__enter__()
        request.addfinalizer(lambda: context.__exit__(None, None, None))
        return url

    return start


@contextmanager
def _served(node: FakeNode, api_key: str | None) -> Iterator[str]:
    started = threading.Event()
    url = ""
    token: trio.lowlevel.TrioToken
    scope = trio.CancelScope()

    async def run() -> None:
        nonlocal url, token
        token = trio.lowlevel.current_trio_token()
        with scope:
            async with serve_node(node, api_key) as url:
                started.set()
                await trio.sleep_forever()

    thread = threading.Thread(target=trio.run, args=(run,))
    thread.start()
    assert started.wait(timeout=10)
    try:
        yield url
    finally:
        trio.from_thread.run_sync(scope.cancel, trio_token=token)
        thread.join()
