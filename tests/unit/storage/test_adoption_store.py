"""What trials found, across restarts."""

from pathlib import Path

import pytest

from node.storage.adoption_store import StandingStore
from node.storage.database import open_database


async def test_what_was_found_is_recalled_by_the_same_software_only(tmp_path: Path) -> None:
    async with open_database(tmp_path / "db") as database:
        store = StandingStore(database, "1")
        await store.keep("long", {"a": (-1.0, 100), "b": (0.5, 100)})
        await store.keep("short", {"a": (0.0, 50)})
        await store.keep("long", {"a": (-1.5, 200)})
    async with open_database(tmp_path / "db") as database:
        assert await StandingStore(database, "1").recall() == {"short": {"a": (0.0, 50)}, "long": {"a": (-1.5, 200)}}
        assert await StandingStore(database, "2").recall() == {}


async def test_kinds_tried_longest_ago_make_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("node.storage.adoption_store.MAX_KINDS", 2)
    async with open_database(tmp_path / "db") as database:
        store = StandingStore(database, "1")
        for number in range(4):
            await store.keep(f"kind {number}", {"a": (0.0, 100 - number), "b": (1.0, 100 - number)})
        assert set(await store.recall()) == {"kind 0", "kind 1"}
