import hashlib
import random
from collections.abc import Awaitable, Callable
from contextlib import suppress

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from trio.testing import MockClock

from node.network.interface import NetworkError, Stream, StreamClosed
from node.replication.anti_entropy import (
    MAX_FRUITLESS_COMPARES,
    MAX_PUT_ENVELOPES,
    MAX_UNDELIVERED,
    SyncInitiator,
    SyncResponder,
)
from node.replication.session import SILENCE_S
from protocol.errors import RemoteProtocolError
from protocol.limits import MAX_GET
from protocol.reconciliation import BUCKET_DIGITS, Listing, PackedIds, Split, Summary, digest_of
from protocol.states import Role
from protocol.sync import Answers, Compare, Get, Greeting, Items, Put, Taken, Welcome
from tests.support.observations import NOW_S
from tests.support.sync_sessions import Peer, ScriptedEnd, made, meet, stream_to, synchronise

BUCKET = made(0).bucket
DIGEST = bytes(32)
GREETING = Greeting(first_bucket=0, count=0, digest=digest_of([]).digest)

numbers = st.sets(st.tuples(st.integers(0, 80), st.integers(0, 3)), max_size=60)


@given(numbers, numbers, numbers)
@settings(deadline=None, max_examples=40)
def test_anti_entropy_makes_any_two_histories_equal(
    common: set[tuple[int, int]], left: set[tuple[int, int]], right: set[tuple[int, int]]
) -> None:
    ours = Peer(made(*arguments) for arguments in common | left)
    theirs = Peer(made(*arguments) for arguments in common | right)

    async def program() -> None:
        initiator, responder = await synchronise(ours, theirs)
        assert initiator.outcome.equal
        assert responder.outcome.equal
        assert initiator.outcome.differed is (left - common != right - common)
        assert initiator.outcome.received == len(right - left - common) == responder.outcome.sent
        assert initiator.outcome.sent == len(left - right - common) == responder.outcome.received

    trio.run(program, clock=MockClock(autojump_threshold=0))
    assert ours.ids == theirs.ids == {made(*arguments).id for arguments in common | left | right}


async def test_equal_histories_cost_one_message_each(virtual_clock: MockClock) -> None:
    observations = [made(number) for number in range(100)]
    initiator, responder = await synchronise(Peer(observations), Peer(observations))
    assert initiator.outcome.equal
    assert initiator.outcome.bytes_sent < 150
    assert responder.outcome.bytes_sent < 100


async def test_session_cost_follows_the_difference(virtual_clock: MockClock) -> None:
    costs_bytes = []
    for common in (60, 600):
        observations = [made(number) for number in range(common)]
        new = [made(1000 + number) for number in range(3)]
        initiator, responder = await synchronise(Peer(observations), Peer(observations + new))
        assert initiator.outcome.received == 3
        costs_bytes.append(initiator.outcome.bytes_sent + responder.outcome.bytes_sent)
    assert costs_bytes[1] < 2 * costs_bytes[0]


async def test_newcomer_fetches_whole_history_in_one_session(virtual_clock: MockClock) -> None:
    observations = [made(number, number % 5) for number in range(MAX_GET + 100)]
    newcomer = Peer()
    initiator, responder = await synchronise(newcomer, Peer(observations))
    assert initiator.outcome.equal
    assert len(newcomer.ids) == len(observations)
    payload_bytes = sum(len(observation.envelope) for observation in observations)
    assert responder.outcome.bytes_sent < 1.1 * payload_bytes


async def test_envelopes_put_per_session_are_bounded(virtual_clock: MockClock) -> None:
    """Else all neighbours of a newcomer would send it everything at once."""
    owner, newcomer = Peer(made(number) for number in range(MAX_PUT_ENVELOPES + 50)), Peer()
    initiator, _ = await synchronise(owner, newcomer)
    assert not initiator.outcome.equal
    assert len(newcomer.ids) == MAX_PUT_ENVELOPES
    initiator, _ = await synchronise(owner, newcomer)
    assert initiator.outcome.equal


async def test_broken_session_keeps_received_records(virtual_clock: MockClock) -> None:
    owner, newcomer = Peer(made(number) for number in range(300)), Peer()
    await owner.history.add_many(owner.initial)

    async def serve(stream: Stream) -> None:
        with trio.CancelScope() as scope:
            responder = SyncResponder(stream, owner.throttle, owner.replica)

            async def pay_traffic(sent_bytes: int) -> None:
                if responder.outcome.sent > 100:
                    await trio.sleep(1)
                    scope.cancel()

            owner.throttle.pay_traffic = pay_traffic  # type: ignore[method-assign]
            await responder.run()
        await stream.reset()

    async with stream_to(serve) as stream:
        with pytest.raises(NetworkError):
            await SyncInitiator(stream, newcomer.throttle, newcomer.replica, random.Random(0)).run()
    kept = len(newcomer.ids)
    assert 0 < kept < 300
    assert not newcomer.replica.requested
    owner.throttle = Peer().throttle
    initiator, _ = await synchronise(newcomer, owner)
    assert initiator.outcome.equal
    assert initiator.outcome.received == 300 - kept


async def test_concurrent_sessions_do_not_fetch_the_same_ids(virtual_clock: MockClock) -> None:
    newcomer = Peer()
    newcomer.replica.requested.add(made(1).id)
    initiator, responder = await synchronise(newcomer, Peer([made(1), made(2)]))
    assert responder.outcome.sent == 1
    assert not initiator.outcome.equal


async def test_early_observations_are_postponed_without_a_ban(virtual_clock: MockClock) -> None:
    early = Peer([made(1)], now_s=NOW_S)
    late = Peer(now_s=NOW_S - 90)
    initiator, _ = await synchronise(late, early)
    assert initiator.outcome.received == 0
    assert late.ids == set()
    initiator, responder = await synchronise(late, early)
    assert responder.outcome.sent == 0, "declined a moment ago, and asked for again"


async def test_sessions_compare_only_buckets_within_both_age_limits(virtual_clock: MockClock) -> None:
    old = made(5, hours_ago=24 * 30)
    keeper, other = Peer([old, made(1)]), Peer([made(1)])
    initiator, _ = await synchronise(keeper, other)
    assert initiator.outcome.equal
    assert not initiator.outcome.differed


# Responders that lie


def listing(*ids: bytes) -> Listing:
    return Listing(((BUCKET, PackedIds.of(ids)),))


def invented(number: int) -> bytes:
    return hashlib.sha256(f"invented {number}".encode()).digest()


async def test_forged_observation_in_an_answer_is_rejected(virtual_clock: MockClock) -> None:
    forged = bytearray(made(1).envelope)
    forged[-1] ^= 1

    async def liar(end: ScriptedEnd) -> None:
        await end.receive()
        await end.send(Welcome(first_bucket=0, answer=listing(made(1).id)))
        await end.receive()
        await end.send(Items((bytes(forged),), last=True))
        await end.receive()

    peer = Peer()
    with pytest.raises(RemoteProtocolError):
        await meet(peer, liar)
    assert peer.ids == set()


async def test_unrequested_observation_is_rejected(virtual_clock: MockClock) -> None:
    async def liar(end: ScriptedEnd) -> None:
        await end.receive()
        await end.send(Welcome(first_bucket=0, answer=listing(made(1).id)))
        await end.receive()
        await end.send(Items((made(2).envelope,), last=True))
        await end.receive()

    peer = Peer()
    with pytest.raises(RemoteProtocolError, match="not requested"):
        await meet(peer, liar)
    assert peer.ids == set()


async def test_listed_but_undelivered_ids_are_a_violation(virtual_clock: MockClock) -> None:
    async def liar(end: ScriptedEnd) -> None:
        await end.receive()
        ids = [invented(number) for number in range(MAX_UNDELIVERED + 1)]
        await end.send(Welcome(first_bucket=0, answer=listing(*ids)))
        while await end.receive() is not None:
            await end.send(Items((), last=True))

    with pytest.raises(RemoteProtocolError, match="but not delivered"):
        await meet(Peer(), liar)


async def test_endless_splits_end_at_the_compare_bound(virtual_clock: MockClock) -> None:
    compares = 0

    async def liar(end: ScriptedEnd) -> None:
        nonlocal compares
        draw = random.Random(0)

        def split(prefix: str) -> Split:
            # Wide above, and deep below: every answer asks for sixteen more questions.
            stem = prefix if len(prefix) < BUCKET_DIGITS + 60 else prefix[: BUCKET_DIGITS + 60]
            return Split(tuple(Summary(stem + digit, 1 << 20, draw.randbytes(32)) for digit in "0123456789abcdef"))

        await end.receive()
        await end.send(Welcome(first_bucket=0, answer=split("")))
        while isinstance(message := await end.receive(), Compare):
            compares += 1
            answers = tuple(split(query.prefix) for query in message.queries[:40] if len(query.prefix) < 66)
            await end.send(Answers(answers or (Listing(()),)))

    peer = Peer(made(number) for number in range(20))
    initiator = await meet(peer, liar)
    assert not initiator.outcome.equal
    assert compares <= MAX_FRUITLESS_COMPARES + 1
    assert peer.throttle.work == 0


async def test_silent_responder_times_out(virtual_clock: MockClock) -> None:
    async def liar(end: ScriptedEnd) -> None:
        await end.receive()
        await trio.sleep_forever()

    started_s = trio.current_time()
    with pytest.raises(NetworkError, match="no message within"):
        await meet(Peer(), liar)
    assert trio.current_time() - started_s < SILENCE_S + 1


async def test_envelopes_put_to_a_lying_responder_are_bounded(virtual_clock: MockClock) -> None:
    given_away = 0

    async def liar(end: ScriptedEnd) -> None:
        nonlocal given_away
        await end.receive()
        await end.send(Welcome(first_bucket=0, answer=Listing(())))
        while (message := await end.receive()) is not None:
            if isinstance(message, Put):
                given_away += len(message.envelopes)
                await end.send(Taken(count=len(message.envelopes)))
            else:
                await end.send(Answers((Listing(()),)))

    initiator = await meet(Peer(made(number) for number in range(600)), liar)
    assert not initiator.outcome.equal
    assert given_away == MAX_PUT_ENVELOPES


# Initiators that lie


async def serve_liar(peer: Peer, liar: Callable[[ScriptedEnd], Awaitable[None]]) -> SyncResponder:
    """Serve one session to an initiator that lies; raise what it is accused of."""
    await peer.history.add_many(peer.initial)
    responders: list[SyncResponder] = []
    faults: list[RemoteProtocolError] = []

    async def serve(stream: Stream) -> None:
        responders.append(SyncResponder(stream, peer.throttle, peer.replica))
        try:
            await responders[0].run()
        except RemoteProtocolError as fault:
            faults.append(fault)
            await stream.reset()

    async with stream_to(serve) as stream:
        with suppress(StreamClosed):
            await liar(ScriptedEnd(stream, Role.INITIATOR))
    if faults:
        raise faults[0]
    return responders[0]


async def greet(end: ScriptedEnd) -> None:
    await end.send(GREETING)
    assert isinstance(await end.receive(), Welcome)


async def test_forged_observations_in_a_put_are_rejected(virtual_clock: MockClock) -> None:
    forged = bytearray(made(1).envelope)
    forged[-1] ^= 1

    async def liar(end: ScriptedEnd) -> None:
        await greet(end)
        await end.send(Put((made(2).envelope, bytes(forged))))
        await end.receive()

    peer = Peer()
    with pytest.raises(RemoteProtocolError):
        await serve_liar(peer, liar)
    assert peer.ids == set()


async def test_request_for_unknown_ids_returns_nothing(virtual_clock: MockClock) -> None:
    async def liar(end: ScriptedEnd) -> None:
        await greet(end)
        await end.send(Get(tuple(sorted(invented(number) for number in range(MAX_GET)))))
        assert await end.receive() == Items((), last=True)

    responder = await serve_liar(Peer([made(1)]), liar)
    assert responder.outcome.sent == 0


async def test_work_and_traffic_are_charged_to_the_initiator(virtual_clock: MockClock) -> None:
    observations = [made(number) for number in range(100)]

    async def liar(end: ScriptedEnd) -> None:
        await greet(end)
        for _ in range(10):
            await end.send(Get(tuple(sorted(observation.id for observation in observations))))
            while isinstance(items := await end.receive(), Items) and not items.last:
                pass
            await end.send(Compare((Summary("", 1, DIGEST),) * 64))
            await end.receive()
            await end.send(Put(tuple(observation.envelope for observation in observations[:10])))
            await end.receive()

    peer = Peer(observations)
    responder = await serve_liar(peer, liar)
    assert peer.throttle.traffic > 0.9 * responder.outcome.bytes_sent
    # Ten times ten envelopes of at least four signatures' work each, and ten times 64 questions.
    assert peer.throttle.work > 10 * (10 * 4 + 64 * 0.1)


async def test_answers_are_cut_to_the_size_of_a_message(virtual_clock: MockClock) -> None:
    observations = [made(number, number % 7) for number in range(400)]
    whole = Summary("", 0, DIGEST)

    async def liar(end: ScriptedEnd) -> None:
        await greet(end)
        await end.send(Compare((whole,) * 64))
        heard = await end.receive()
        assert isinstance(heard, Answers)
        assert 1 <= len(heard.answers) < 64
        assert all(isinstance(answer, Listing) for answer in heard.answers)

    await serve_liar(Peer(observations), liar)
