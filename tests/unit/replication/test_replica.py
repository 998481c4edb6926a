import pytest
import trio
from trio.testing import MockClock

from node.replication.replica import DECLINED_S, SNAPSHOT_S, VERIFIED_ENVELOPES, Replica, verification_cost
from node.testing.memory_history import MemoryHistory
from protocol.errors import RemoteProtocolError
from protocol.observations import SignedObservation, oldest_bucket, verify_observation
from tests.support.observations import NOW_S, signed
from tests.support.sync_sessions import made


async def test_tree_contains_stored_observations_at_once(virtual_clock: MockClock) -> None:
    replica = Replica(MemoryHistory(), lambda: NOW_S)
    assert (await replica.tree()).summary("").count == 0
    assert await replica.store([made(1), made(2)]) == 2
    assert (await replica.tree()).summary("").count == 2
    assert await replica.store([made(2), made(3)]) == 1
    assert (await replica.tree()).summary("").count == 3


async def test_tree_contains_observations_of_other_writers_soon(virtual_clock: MockClock) -> None:
    history = MemoryHistory()
    replica = Replica(history, lambda: NOW_S)
    await replica.tree()
    await history.add_many([made(1)])
    await trio.sleep(SNAPSHOT_S)
    assert (await replica.tree()).summary("").count == 1


async def test_concurrent_readers_wait_for_the_first_snapshot(virtual_clock: MockClock) -> None:
    class SlowHistory(MemoryHistory):
        async def bucket_digests(self):  # type: ignore[no-untyped-def]
            await trio.sleep(5)
            return await super().bucket_digests()

    history = SlowHistory()
    await history.add_many([made(1)])
    replica = Replica(history, lambda: NOW_S)
    counts = []

    async def look() -> None:
        counts.append((await replica.tree()).summary("").count)

    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(look)
    assert counts == [1, 1, 1]


async def test_too_old_and_too_early_observations_are_declined(virtual_clock: MockClock) -> None:
    history = MemoryHistory()
    replica = Replica(history, lambda: NOW_S)
    too_old = made(1, hours_ago=24 * 31)
    too_early = signed(2, issued_at_s=NOW_S + 100)
    assert await replica.store([too_old, too_early, made(3)]) == 1
    assert set(history.envelopes) == {made(3).id}
    assert not replica.wants(too_old.id)
    assert not replica.wants(too_early.id)
    await trio.sleep(DECLINED_S)
    assert replica.wants(too_early.id)


async def test_ids_declined_by_the_store_are_not_requested_again_soon(virtual_clock: MockClock) -> None:
    class FullHistory(MemoryHistory):
        async def add_many(self, observations: object) -> list[SignedObservation]:
            del observations
            return []

    replica = Replica(FullHistory(), lambda: NOW_S)
    assert await replica.store([made(1)]) == 0
    assert not replica.wants(made(1).id)
    await trio.sleep(DECLINED_S + 1)
    assert replica.wants(made(1).id)


def test_envelope_is_verified_once_while_cached() -> None:
    verified: list[bytes] = []

    def verify(envelope: bytes) -> SignedObservation:
        verified.append(envelope)
        return verify_observation(envelope)

    replica = Replica(MemoryHistory(), lambda: NOW_S, verify)
    assert replica.verifier.cost(made(0).envelope) > 1
    assert replica.verify(made(0).envelope) == replica.verify(made(0).envelope) == made(0)
    assert replica.verifier.cost(made(0).envelope) < 1
    assert len(verified) == 1
    for number in range(1, VERIFIED_ENVELOPES + 1):
        replica.verify(made(number).envelope)
    assert replica.verifier.cost(made(0).envelope) > 1


def test_invalid_envelope_is_never_cached() -> None:
    replica = Replica(MemoryHistory(), lambda: NOW_S)
    for _ in range(2):
        with pytest.raises(RemoteProtocolError):
            replica.verify(made(1).envelope[:-1] + b"?")


def test_first_compared_bucket_allows_for_clock_skew() -> None:
    replica = Replica(MemoryHistory(), lambda: NOW_S)
    assert replica.first_bucket() == oldest_bucket(NOW_S) + 1


def test_countersignatures_raise_the_verification_cost() -> None:
    alone, with_stages = signed(1), signed(1, stages=[1, 2, 3, 4])
    assert verification_cost(with_stages.envelope) >= 5
    assert verification_cost(alone.envelope) < verification_cost(with_stages.envelope)
