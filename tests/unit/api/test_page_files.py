"""The page's files as the server sends them. What the page does: tests/browser."""

import re
from pathlib import Path

import httpx
import pytest

from node.api.page_files import MEDIA_TYPES
from tests.unit.api.fakes import FakeNode, serve_node

FOLDER = Path(__file__).parents[3] / "node/api/page"
FILES = sorted(path.name for path in FOLDER.iterdir())


async def test_page_admits_nothing_from_elsewhere_and_nothing_inline(client: httpx.AsyncClient) -> None:
    answer = await client.get("/")
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    policy = dict(part.strip().split(" ", 1) for part in answer.headers["content-security-policy"].split(";"))
    assert policy["default-src"] == "'none'"
    assert set(policy.values()) <= {"'none'", "'self'"}
    assert policy["frame-ancestors"] == "'none'"
    assert not re.search(r"<script(?![^>]*\bsrc=)|<style|\sstyle=|\son\w+=", answer.text)


@pytest.mark.parametrize("name", FILES)
async def test_serves_every_file_and_names_only_files_of_its_own(client: httpx.AsyncClient, name: str) -> None:
    answer = await client.get(f"/page/{name}")
    assert answer.headers["content-type"] == MEDIA_TYPES[Path(name).suffix]
    assert answer.headers["x-content-type-options"] == "nosniff"
    again = await client.get(f"/page/{name}", headers={"If-None-Match": answer.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    imported = re.findall(r'(?:from|import) "\./([^"]+)"|"/page/([^"]+)"', answer.text)
    assert {first or second for first, second in imported} <= set(FILES)
    foreign = set(re.findall(r"https?://[^\"'\s)]+", answer.text)) - {"http://www.w3.org/2000/svg"}
    assert foreign == set()


@pytest.mark.parametrize("name", ["style.scss", "..%2Fpages.py", "%2E%2E%2Fpages.py", "index.html%00"])
async def test_serves_no_other_file(client: httpx.AsyncClient, name: str) -> None:
    assert (await client.get(f"/page/{name}")).status_code == 404


async def test_page_needs_no_api_key_but_its_data_does(node: FakeNode) -> None:
    async with serve_node(node, api_key="sesame") as url, httpx.AsyncClient(base_url=url) as client:
        for path in ("/", "/page/main.js"):
            assert (await client.get(path)).status_code == 200
        for path in ("/swarm/events", "/swarm/jobs", "/swarm/learning", "/swarm/join"):
            assert (await client.get(path)).status_code == 401
        key = {"Authorization": "Bearer sesame"}
        assert (await client.get("/swarm/jobs", headers=key)).status_code == 200
