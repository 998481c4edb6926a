from collections.abc import Callable

import pytest

from tests.unit.api.fakes import FakeNode, serve_in_thread


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
        context = serve_in_thread(node, api_key)
        url = context.__enter__()
        request.addfinalizer(lambda: context.__exit__(None, None, None))
        return url

    return start
