"""Trial results survive restarts."""

from pathlib import Path

import pytest

from node.storage.adoption_store import AdoptionStore
from node.storage.database import open_database


async def test_results_are_loaded_by_the_same_software_only(tmp_path: Path) -> None:
    async with open_database(tmp_path / "db") as database:
        store = AdoptionStore(database, "1")
        await store.save("long", {"a": (-1.0, 100), "b": (0.5, 100)})
        await store.save("short", {"a": (0.0, 50)})
        await store.save("long", {"a": (-1.5, 200)})
    async with open_database(tmp_path / "db") as database:
        assert await AdoptionStore(database, "1").load() == {"short": {"a": (0.0, 50)}, "long": {"a": (-1.5, 200)}}
        assert await AdoptionStore(database, "2").load() == {}


async def test_longest_untried_buckets_are_evicted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("node.storage.adoption_store.MAX_BUCKETS", 2)
    async with open_database(tmp_path / "db") as database:
        store = AdoptionStore(database, "1")
        for number in range(4):
            await store.save(f"bucket {number}", {"a": (0.0, 100 - number), "b": (1.0, 100 - number)})
        assert set(await store.load()) == {"bucket 0", "bucket 1"}
