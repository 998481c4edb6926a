"""The history on disk: a set that comes back as it was, whatever order it came in."""

import hashlib
import random
import sqlite3
import threading
from collections.abc import Iterable
from itertools import accumulate
from pathlib import Path

import pytest
import trio
import trio.testing
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from node.storage.database import Database, open_database
from node.storage.history import PAGE, HistoryStore
from protocol.limits import MAX_OBSERVATION_AGE_S
from protocol.observations import BUCKET_S, SignedObservation, bucket_of
from protocol.reconciliation import BucketDigest, IdCache, SetTree
from selector.retention import HistoryBounds
from tests.support.observations import NOW_S, peer, signed

POOL = [signed(n, observer=n % 3, issued_at_s=NOW_S - (n % 5) * BUCKET_S) for n in range(40)]


def file(tmp_path: Path) -> Path:
    return tmp_path / "metaswarm.sqlite3"


async def envelopes_of(store: HistoryStore) -> list[bytes]:
    return [stored.envelope async for page in store.pages() for stored in page]


async def test_added_observations_survive_reopening(tmp_path: Path) -> None:
    async with open_database(file(tmp_path)) as database:
        store = HistoryStore(database)
        assert await store.add_many(POOL) == tuple(POOL)
        digest = await store.digest()
    async with open_database(file(tmp_path)) as database:
        assert database.set_aside is None
        store = HistoryStore(database)
        assert sorted(await envelopes_of(store)) == sorted(each.envelope for each in POOL)
        assert await store.digest() == digest
        assert digest.count == len(POOL)


async def test_known_observation_is_not_new(tmp_path: Path) -> None:
    async with open_database(file(tmp_path)) as database:
        store = HistoryStore(database)
        assert await store.add_many([POOL[0]])
        assert not await store.add_many([POOL[0]])
        digest = await store.digest()
        assert await store.add_many([POOL[0], POOL[1], POOL[1]]) == (POOL[1],)
        assert await store.add_many([]) == ()
        assert (await store.digest()).count == 2
        assert await store.digest() != digest


async def test_digests_match_the_compared_tree(tmp_path: Path) -> None:
    async with open_database(file(tmp_path)) as database:
        store = HistoryStore(database)
        assert await store.bucket_digests() == {}
        await store.add_many(POOL)
        digests = await store.bucket_digests()
        for bucket, found in digests.items():
            ids = sorted(each.id for each in POOL if each.bucket == bucket)
            assert found == BucketDigest(len(ids), hashlib.sha256(b"".join(ids)).digest())
            assert list(await store.ids_in(bucket)) == ids
        assert set(digests) == {each.bucket for each in POOL}
        assert await store.ids_in(7) == ()
        root = SetTree(digests, IdCache()).summary("")
        assert await store.digest() == BucketDigest(root.count, root.digest)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.lists(st.sampled_from(POOL), max_size=12), max_size=6), st.randoms(use_true_random=False))
def test_digests_do_not_depend_on_order_or_repetition(
    tmp_path_factory: pytest.TempPathFactory, batches: list[list[SignedObservation]], shuffle: random.Random
) -> None:
    tmp_path = tmp_path_factory.mktemp("order")
    everything = [each for batch in batches for each in batch]
    shuffle.shuffle(everything)

    async def check() -> None:
        async with open_database(tmp_path / "one") as one, open_database(tmp_path / "other") as other:
            first, second = HistoryStore(one), HistoryStore(other)
            for batch in batches:
                await first.add_many(batch)
                await first.bucket_digests()
            for each in everything:
                await second.add_many([each])
            assert await first.bucket_digests() == await second.bucket_digests()

    trio.run(check)


async def test_digests_follow_writes_of_another_process(tmp_path: Path) -> None:
    """`history import` writes into the file of a running node: here with a connection of its own."""
    async with open_database(file(tmp_path)) as database, open_database(file(tmp_path), set_aside=False) as other:
        store, importer = HistoryStore(database), HistoryStore(other)
        await store.add_many(POOL[:10])
        before = await store.digest()
        await importer.add_many(POOL)
        assert await store.digest() == await importer.digest() != before


async def test_concurrent_processes_lose_no_writes(tmp_path: Path) -> None:
    async with open_database(file(tmp_path)) as database, open_database(file(tmp_path), set_aside=False) as other:
        async with trio.open_nursery() as nursery:
            for number, each in enumerate(POOL):
                nursery.start_soon(HistoryStore(other if number % 2 else database).add_many, [each])
        assert (await HistoryStore(database).digest()).count == len(POOL)


async def test_group_commit_shares_transactions(tmp_path: Path) -> None:
    commits = 0

    def count(statement: str) -> None:
        nonlocal commits
        commits += statement == "COMMIT"

    async with open_database(file(tmp_path)) as database:
        store = HistoryStore(database)
        await database.write(lambda connection: connection.set_trace_callback(count))
        async with trio.open_nursery() as nursery:
            for each in POOL:
                nursery.start_soon(store.add_many, [each])
        assert (await store.digest()).count == len(POOL)
    assert commits < len(POOL) / 2


async def test_failed_write_does_not_affect_its_batch(tmp_path: Path) -> None:
    failed = []

    def spoil(connection: sqlite3.Connection) -> None:
        connection.execute("DELETE FROM observations")
        raise ZeroDivisionError

    async def fail(database: Database) -> None:
        try:
            await database.write(spoil)
        except ZeroDivisionError as error:
            failed.append(error)

    async with open_database(file(tmp_path)) as database:
        store = HistoryStore(database)
        async with trio.open_nursery() as nursery:
            for number, each in enumerate(POOL):
                nursery.start_soon(store.add_many, [each])
                if number in {10, 30}:
                    nursery.start_soon(fail, database)
        assert len(failed) == 2
        assert (await store.digest()).count == len(POOL)


class HeldWriter:
    """A write that holds the file until it is let go."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._let_go = threading.Event()

    async def hold(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        token = trio.lowlevel.current_trio_token()

        def wait(_: sqlite3.Connection) -> None:
            token.run_sync_soon(task_status.started)
            self._let_go.wait(timeout=10)

        await self._database.write(wait)

    def let_go(self) -> None:
        self._let_go.set()


async def test_write_cancelled_in_the_queue_writes_nothing(tmp_path: Path) -> None:
    async with open_database(file(tmp_path)) as database, trio.open_nursery() as nursery:
        store, held = HistoryStore(database), HeldWriter(database)
        await nursery.start(held.hold)
        async with trio.open_nursery() as waiting:
            waiting.start_soon(store.add_many, [POOL[0]])
            await trio.testing.wait_all_tasks_blocked()
            waiting.cancel_scope.cancel()
        held.let_go()
        await store.add_many([POOL[1]])
        assert await store.get_many([POOL[0].id, POOL[1].id]) == (POOL[1].envelope,)


async def test_write_cancelled_at_its_turn_does_not_block_others(tmp_path: Path) -> None:
    async with open_database(file(tmp_path)) as database, trio.open_nursery() as nursery:
        store, held, scope = HistoryStore(database), HeldWriter(database), trio.CancelScope()

        async def add(number: int) -> None:
            await store.add_many([POOL[number]])

        async def add_until_cancelled() -> None:
            with scope:
                await store.add_many([POOL[0]])

        async def hold_then_cancel(task_status: trio.TaskStatus[None]) -> None:
            await held.hold(task_status)
            scope.cancel()  # the next in line has its turn by now, and has not yet begun

        await nursery.start(hold_then_cancel)
        nursery.start_soon(add_until_cancelled)
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(add, 1)
        await trio.testing.wait_all_tasks_blocked()
        held.let_go()
        nursery.start_soon(add, 2)
        await trio.testing.wait_all_tasks_blocked()
    async with open_database(file(tmp_path)) as database:
        wanted = [POOL[1], POOL[2]]
        found = await HistoryStore(database).get_many([each.id for each in wanted])
        assert found == tuple(each.envelope for each in wanted)


async def test_envelopes_are_found_by_their_ids(tmp_path: Path) -> None:
    async with open_database(file(tmp_path)) as database:
        store = HistoryStore(database)
        await store.add_many(POOL[:5])
        wanted = [POOL[3].id, POOL[20].id, POOL[0].id]
        assert await store.get_many(wanted) == (POOL[3].envelope, POOL[0].envelope)
        assert await store.get_many([]) == ()


async def test_iteration_is_ordered_by_time_in_pages(tmp_path: Path) -> None:
    records = [signed(n, issued_at_s=NOW_S + (n % 3) * BUCKET_S) for n in range(PAGE + 10)]
    async with open_database(file(tmp_path)) as database:
        store = HistoryStore(database)
        await store.add_many(records)
        ordered = sorted(records, key=lambda each: (each.bucket, each.id))
        assert await envelopes_of(store) == [each.envelope for each in ordered]


async def test_observations_are_counted_by_observer(tmp_path: Path) -> None:
    async with open_database(file(tmp_path)) as database:
        store = HistoryStore(database)
        await store.add_many(POOL)
        assert await store.count_by_observer() == {peer(0): 14, peer(1): 13, peer(2): 13}


async def test_retention_drops_whole_closed_shares_and_peers_agree(tmp_path: Path) -> None:
    hour = BUCKET_S
    records = [signed(n, observer=1, issued_at_s=NOW_S - 4 * hour) for n in range(6)]
    records += [signed(n, observer=1, issued_at_s=NOW_S - 3 * hour) for n in range(10, 14)]
    records += [signed(n, observer=2, issued_at_s=NOW_S - 4 * hour) for n in range(20, 23)]
    records += [signed(n, observer=1, issued_at_s=NOW_S) for n in range(30, 50)]
    records += [signed(n, observer=2, issued_at_s=NOW_S - MAX_OBSERVATION_AGE_S - hour) for n in range(60, 62)]
    bounds = HistoryBounds(observer_bytes=8 * len(records[0].envelope) + 100, all_bytes=1 << 20)
    async with open_database(tmp_path / "one") as one, open_database(tmp_path / "other") as other:
        first, second = HistoryStore(one, bounds), HistoryStore(other, bounds)
        await first.add_many(records)
        await second.add_many(records[::-1])
        assert await first.retain(NOW_S) == 8
        assert await first.retain(NOW_S) == 0
        assert await second.retain(NOW_S) == 8
        assert await first.bucket_digests() == await second.bucket_digests()
        assert await first.count_by_observer() == {peer(1): 24, peer(2): 3}
        assert (await first.bucket_digests()).keys() == {bucket_of(NOW_S - h * hour) for h in (0, 3, 4)}


async def test_observations_of_a_clock_that_was_ahead_are_dropped_once_it_is_confirmed(tmp_path: Path) -> None:
    ahead = signed(1, observer=1, issued_at_s=NOW_S + 2 * BUCKET_S)
    present = [signed(number, observer=1, issued_at_s=NOW_S + 50 * number) for number in range(2, 4)]
    async with open_database(tmp_path / "db") as database:
        store = HistoryStore(database)
        await store.add_many([ahead, *present])
        assert await store.retain(NOW_S, by_age=False) == 0
        assert await store.retain(NOW_S) == 1
        assert (await store.digest()).count == len(present)


SIZE_STEP = 2048


def counted(record: SignedObservation) -> int:
    """Return the size of a record in whole steps, by which all peers count."""
    return -(-len(record.envelope) // SIZE_STEP) * SIZE_STEP


def smallest(records: Iterable[SignedObservation], bound: int) -> list[SignedObservation]:
    """Return the records that count least, as many as the bound has room for."""
    ordered = sorted(records, key=lambda each: (counted(each), each.id))
    sums = accumulate(map(counted, ordered))
    return [each for each, held in zip(ordered, sums, strict=True) if held <= bound]


async def test_flood_of_one_observer_is_bounded_in_bytes_whatever_the_order_of_arrival(tmp_path: Path) -> None:
    flood = [signed(n, observer=1, stages=range(n % 9)) for n in range(42)]
    honest = [signed(n, observer=2, stages=(2, 3, 4)) for n in range(100, 104)]
    bounds = HistoryBounds(share_bytes=30_000)
    kept = {each.id for each in smallest(flood, bounds.share_bytes)}
    digests = []
    for seed in range(5):
        async with open_database(tmp_path / f"{seed}") as database:
            store = HistoryStore(database, bounds)
            if seed == 0:
                new = await store.add_many(flood + honest)
                assert {each.id for each in new} == kept | {each.id for each in honest}
            arriving = honest + flood * 2
            random.Random(seed).shuffle(arriving)
            for first in range(0, len(arriving), 1 + seed):
                await store.add_many(arriving[first : first + 1 + seed])
            digests.append(await store.bucket_digests())
            assert await store.count_by_observer() == {peer(1): len(kept), peer(2): 4}
            assert await store.add_many(flood) == ()
    assert all(digest == digests[0] for digest in digests)


async def test_floods_together_are_bounded_in_bytes(tmp_path: Path) -> None:
    floods = [signed(n, observer=n, stages=range(n % 9)) for n in range(30)]
    async with open_database(file(tmp_path)) as database:
        store = HistoryStore(database, HistoryBounds(bucket_bytes=30_000))
        for each in floods:
            await store.add_many([each])
        kept = smallest(floods, 30_000)
        assert 0 < len(kept) < 30
        assert list(await store.ids_in(bucket_of(NOW_S))) == sorted(each.id for each in kept)


async def test_honest_observations_fare_like_a_flood_of_minimal_ones(tmp_path: Path) -> None:
    flood = [signed(n, observer=n % 4) for n in range(80)]
    honest = [signed(n, observer=9, stages=range(2, 5)) for n in range(100, 120)]
    assert max(len(each.envelope) for each in flood) < min(len(each.envelope) for each in honest)
    bounds, digests = HistoryBounds(bucket_bytes=50 * SIZE_STEP), []
    for number, arriving in enumerate((flood + honest, honest + flood)):
        async with open_database(tmp_path / f"{number}") as database:
            store = HistoryStore(database, bounds)
            for each in arriving:
                await store.add_many([each])
            assert list(await store.ids_in(bucket_of(NOW_S))) == sorted(each.id for each in arriving)[:50]
            assert (await store.count_by_observer())[peer(9)] > 0
            digests.append(await store.bucket_digests())
    assert digests[0] == digests[1]


async def test_few_large_observations_are_evicted_like_many_small_ones(tmp_path: Path) -> None:
    old, new = NOW_S - 5 * BUCKET_S, NOW_S - 4 * BUCKET_S
    records = [signed(n, observer=1, stages=range(16), issued_at_s=old) for n in range(4)]
    records += [signed(n, observer=1, stages=range(16), issued_at_s=new) for n in range(10, 14)]
    records += [signed(n, observer=2, issued_at_s=old) for n in range(20, 26)]
    async with open_database(file(tmp_path)) as database:
        store = HistoryStore(database, HistoryBounds(observer_bytes=20_000))
        await store.add_many(records)
        assert await store.retain(NOW_S) == 4
        assert await store.count_by_observer() == {peer(1): 4, peer(2): 6}
