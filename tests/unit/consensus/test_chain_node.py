"""A chain node survives damaged storage, a flood of old messages, and endless questions."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NoReturn

import pytest
import trio
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from trio.testing import MockClock

from node.consensus import message_log
from node.consensus.chain_node import ChainNode
from node.consensus.chain_sync import MAX_ROUNDS, ChainInitiator, ChainResponder
from node.consensus.environment import ConsensusEnvironment, ConsensusRules
from node.identity import Identity
from node.replication.session import Throttle
from node.storage.chain_store import ChainStore
from node.storage.database import StorageError, StorageFull
from node.testing.chain_store import MemoryDatabase, memory_chain_store
from node.testing.memory_history import MemoryHistory
from node.util.offload import run_inline
from protocol.chains import PROTOCOL_ID, ChainConnection, GetStatements, Records, Remaining
from protocol.consensus import SignedMessage, sign_message, verify_message
from protocol.consensus_values import Commit, EquivocationProof, Reveal, Signature
from protocol.errors import RemoteProtocolError
from protocol.identity import PeerId, peer_id_from_public_key
from protocol.states import Role
from tests.support.agreement import CLOCK, GENESIS, HARDWARE, PLAN, IdleMeter
from tests.support.observations import signed
from tests.support.statements import founding_statement

EPOCH = 1000
OWN = Identity(b"7" * 32)


class FullStore(ChainStore):
    """A store on a full disk."""

    async def save_messages(
        self,
        chain: bytes,
        rows: Sequence[tuple[bytes, int, bytes]],
        oldest_epoch: int,
        withheld: Sequence[bytes] | None = None,
    ) -> None:
        del chain, rows, oldest_epoch, withheld
        await trio.lowlevel.checkpoint()
        raise StorageFull("no space left")


def chain_node(store: ChainStore, published: list[SignedMessage] | None = None) -> ChainNode:
    def publish(messages: Sequence[SignedMessage]) -> None:
        if published is not None:
            published.extend(messages)

    environment = ConsensusEnvironment(
        identity=OWN,
        store=store,
        history=MemoryHistory(),
        models=dict,
        hardware=lambda: HARDWARE,
        meter=lambda _: IdleMeter(),
        wall_clock=lambda: CLOCK.starts_s(EPOCH),
        offload=run_inline,
    )
    rules = ConsensusRules(swarm=b"swarm", plan=PLAN, clock=CLOCK)
    return ChainNode(environment, rules, GENESIS, IdleMeter(), participates=lambda: False, publish=publish)


class WithholdingMeter(IdleMeter):
    """A meter with observations that it publishes once their readings are revealed."""

    def __init__(self, *envelopes: bytes) -> None:
        self.unrevealed, self.published = [*envelopes], list[bytes]()

    async def revealed(self) -> None:
        await trio.lowlevel.checkpoint()
        self.published, self.unrevealed = self.unrevealed, []

    def withheld(self) -> list[bytes]:
        return self.unrevealed

    def restore(self, envelopes: Sequence[bytes]) -> None:
        self.unrevealed += envelopes


async def test_observations_behind_readings_are_published_by_the_process_that_reveals_them() -> None:
    store, observations = memory_chain_store(), [b"one", b"other"]

    def process(meter: IdleMeter, now_s: float) -> ChainNode:
        node = chain_node(store)
        environment = replace(node._environment, wall_clock=lambda: now_s)
        rules = ConsensusRules(swarm=b"swarm", plan=PLAN, clock=CLOCK)
        return ChainNode(environment, rules, GENESIS, meter, participates=lambda: True, publish=lambda _: None)

    await process(WithholdingMeter(*observations), CLOCK.commits_end_s(EPOCH)).turn()
    restarted = WithholdingMeter()
    node = process(restarted, CLOCK.reveals_begin_s(EPOCH))
    await node.load()
    assert restarted.withheld() == observations
    await node.turn()
    assert restarted.published == observations
    again = WithholdingMeter()
    await process(again, CLOCK.reveals_begin_s(EPOCH)).load()
    assert again.withheld() == []


@pytest.mark.parametrize("failing", ["save_messages", "save_branch"])
async def test_reveal_that_could_not_be_saved_is_published_by_the_next_turn(failing: str) -> None:
    store, meter, published = memory_chain_store(), WithholdingMeter(b"observation"), list[SignedMessage]()
    now_s = CLOCK.commits_end_s(EPOCH)
    rules = ConsensusRules(swarm=b"swarm", plan=PLAN, clock=CLOCK)
    environment = replace(chain_node(store)._environment, wall_clock=lambda: now_s)
    node = ChainNode(environment, rules, GENESIS, meter, participates=lambda: True, publish=published.extend)
    await node.turn()
    assert [type(each.body) for each in published] == [Commit]
    now_s = CLOCK.reveals_begin_s(EPOCH)
    save = getattr(node._recovery, failing)
    setattr(node._recovery, failing, failing_write)
    await node.turn()
    assert len(published) == 1
    assert meter.published == []
    setattr(node._recovery, failing, save)
    for _ in range(2):
        await node.turn()
    assert [type(each.body) for each in published] == [Commit, Reveal]
    assert meter.published == [b"observation"]


class Answerer:
    """The stream of a peer that answers once, with one record."""

    peer, protocol, relay = PeerId("answerer"), PROTOCOL_ID, None

    def __init__(self, envelope: bytes) -> None:
        self._connection = ChainConnection(Role.RESPONDER)
        self._envelope = envelope

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await trio.lowlevel.checkpoint()
        self._connection.receive_data(bytes(data))

    async def receive_some(self, max_bytes: int = 65536) -> bytes:
        del max_bytes
        await trio.lowlevel.checkpoint()
        return self._connection.send(Records(envelopes=(self._envelope,), last=True, rest=Remaining.NOTHING))

    async def aclose(self) -> None:
        await trio.lowlevel.checkpoint()

    async def reset(self) -> None:
        await trio.lowlevel.checkpoint()


async def test_session_that_is_cut_off_while_its_records_are_applied_costs_no_reveal(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, published, now_s = memory_chain_store(), list[SignedMessage](), CLOCK.commits_end_s(EPOCH)
    rules = ConsensusRules(swarm=b"swarm", plan=PLAN, clock=CLOCK)
    environment = replace(chain_node(store)._environment, wall_clock=lambda: now_s)
    node = ChainNode(environment, rules, GENESIS, IdleMeter(), participates=lambda: True, publish=published.extend)
    save = store.save_messages

    async def save_slowly(*arguments: Any) -> None:
        await trio.sleep(2)
        await save(*arguments)

    record = sign_message(Signature(GENESIS, EPOCH, peer(1), bytes(32)), key(1)).envelope
    session = ChainInitiator(Answerer(record), Throttle(), node, verify_message, lambda _: None)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(node.run)
        await trio.sleep(1)
        assert [type(each.body) for each in published] == [Commit]
        monkeypatch.setattr(store, "save_messages", save_slowly)
        now_s = CLOCK.reveals_begin_s(EPOCH)
        with trio.move_on_after(1) as cut_off:
            await session.run()
        assert cut_off.cancelled_caught
        assert len(published) == 1
        await trio.sleep(10)
        assert [type(each.body) for each in published] == [Commit, Reveal]
        monkeypatch.undo()
        with trio.fail_after(1):
            await ChainInitiator(Answerer(record), Throttle(), node, verify_message, lambda _: None).run()
        nursery.cancel_scope.cancel()


async def failing_write(*_: object, **__: object) -> NoReturn:
    await trio.lowlevel.checkpoint()
    raise StorageFull("no space left")


async def failing_read(*_: object) -> NoReturn:
    await trio.lowlevel.checkpoint()
    raise StorageError("unable to open database file")


def key(number: int) -> Ed25519PrivateKey:
    return Ed25519PrivateKey.from_private_bytes(number.to_bytes(32, "big"))


def peer(number: int) -> PeerId:
    return peer_id_from_public_key(key(number).public_key().public_bytes_raw())


def founding(number: int, epoch: int) -> SignedMessage:
    """Return a statement by which a stranger starts the chain as its only member."""
    return sign_message(founding_statement(GENESIS, peer(number), epoch), key(number))


async def test_abstains_this_epoch_after_losing_an_own_message() -> None:
    store = memory_chain_store()
    vote = sign_message(Signature(GENESIS, EPOCH - 1, OWN.peer_id, bytes(32)), OWN.private_key)
    await store.save_messages(GENESIS, [(b"vote", EPOCH - 1, vote.envelope), (b"damaged", EPOCH, b"\0")], 0)
    node = chain_node(store)
    await node.load()
    assert EPOCH in node.replica.participant.signed.closed


@pytest.mark.parametrize("is_full", [False, True], ids=["saved", "disk full"])
async def test_publishes_proof_of_equivocation_only_once_it_is_saved(*, is_full: bool) -> None:
    published: list[SignedMessage] = []
    node = chain_node(FullStore(MemoryDatabase()) if is_full else memory_chain_store(), published)
    votes = [Signature(GENESIS, EPOCH, peer(1), bytes([number]) * 32) for number in range(2)]
    node.receive(sign_message(vote, key(1)) for vote in votes)
    await node.turn()
    assert [message.body for message in published] == (
        [] if is_full else [EquivocationProof(GENESIS, *(sign_message(vote, key(1)).envelope for vote in votes))]
    )


async def test_node_goes_on_while_observations_cannot_be_read_and_confirms_the_commit_later(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    node, now_s = chain_node(memory_chain_store()), CLOCK.starts_s(EPOCH)
    observed = signed(1)
    commit = Commit(GENESIS, EPOCH, GENESIS, peer(1), HARDWARE, bytes(32), (observed.id,))
    with monkeypatch.context() as patch:
        patch.setattr(MemoryHistory, "get_many", failing_read)
        node.receive([sign_message(commit, key(1)), founding(1, EPOCH)])
        await node.turn()
        assert node.replica.participant.unconfirmed(now_s) == [commit]
        [statement] = node.replica.log.statements
        node.receive([sign_message(Signature(GENESIS, EPOCH, peer(1), statement), key(1))])
        await node.turn()
        assert [each.id for each in await node.branch_after((), 64)] == [statement], "the rest of the turn goes on"
        other = chain_node(memory_chain_store())
        other.receive([sign_message(commit, key(1))])
        await other.turn()
    history = other._environment.history
    assert isinstance(history, MemoryHistory)
    await history.add_many([observed])
    await other.turn()
    assert other.replica.participant.unconfirmed(now_s) == []


async def test_turn_outlives_a_database_that_cannot_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    store, published = memory_chain_store(), list[SignedMessage]()
    node = chain_node(store, published)
    await node.turn()
    monkeypatch.setattr(node.replica, "is_state_missing", lambda: True)
    node._pruned_epoch = -1
    with monkeypatch.context() as patch:
        patch.setattr(store, "states", failing_read)
        await node.turn()
    node.receive(sign_message(Signature(GENESIS, EPOCH, peer(1), bytes([each]) * 32), key(1)) for each in range(2))
    await node.turn()
    assert len(published) == 1


async def test_statement_reaches_its_quorum_after_a_flood_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(message_log, "MAX_EVIDENCE", 32)
    monkeypatch.setattr(message_log, "MAX_SPARE", 16)
    node = chain_node(memory_chain_store())
    first = founding(1, 3)
    node.receive([first])
    await node.turn()
    for number in range(2, 100):
        unknown = Signature(GENESIS, number, peer(number), number.to_bytes(32, "big"))
        node.receive([founding(number, 3), sign_message(unknown, key(number))])
    await node.turn()
    assert len(node.replica.log.signatures) <= 2 * 16
    node.prune(CLOCK.starts_s(EPOCH))
    [statement] = [each for each, message in node.replica.log.statements.items() if message == first]
    node.receive([sign_message(Signature(GENESIS, 3, peer(1), statement), key(1))])
    await node.turn()
    assert [each.id for each in await node.branch_after((), 64)] == [statement]


async def test_signatures_outside_the_committee_are_dropped() -> None:
    node = chain_node(memory_chain_store())
    node.receive([founding(1, EPOCH)])
    await node.turn()
    [statement] = node.replica.log.statements
    signed = [sign_message(Signature(GENESIS, EPOCH, peer(number), statement), key(number)) for number in (3, 2, 1)]
    node.receive(signed)
    await node.turn()
    assert [*node.replica.log.signatures[statement].values()] == signed[2:]


class Questioner:
    """The stream of a peer that asks again after every answer."""

    peer, protocol, relay = PeerId("questioner"), PROTOCOL_ID, None

    def __init__(self) -> None:
        self.asked = 0
        self._connection = ChainConnection(Role.INITIATOR)

    async def receive_some(self, max_bytes: int = 65536) -> bytes:
        del max_bytes
        await trio.lowlevel.checkpoint()
        self.asked += 1
        return self._connection.send(GetStatements(chain=GENESIS, locator=(GENESIS,), digest=bytes(32)))

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await trio.lowlevel.checkpoint()
        [items] = self._connection.receive_data(bytes(data))
        assert getattr(items, "rest", None) is Remaining.RECENT

    async def aclose(self) -> None:
        await trio.lowlevel.checkpoint()

    async def reset(self) -> None:
        await trio.lowlevel.checkpoint()


async def test_session_with_endless_requests_is_a_violation() -> None:
    chain = chain_node(memory_chain_store())
    stream = Questioner()
    with pytest.raises(RemoteProtocolError, match="more than"):
        await ChainResponder(stream, Throttle(), lambda genesis: chain).run()
    assert stream.asked == MAX_ROUNDS + 3


def test_nodes_count_the_same_strangers_in_whatever_order_they_come() -> None:
    now_s, held = CLOCK.starts_s(EPOCH) + 1, []
    commits = [
        sign_message(Commit(GENESIS, EPOCH, GENESIS, peer(number), HARDWARE, bytes(32)), key(number))
        for number in range(1, message_log.MAX_UNKNOWN_PEERS[Commit] + 60)
    ]
    for order in (commits, commits[::-1]):
        replica = chain_node(memory_chain_store()).replica
        for message in order:
            replica.apply(message, now_s)
        held.append({commit.peer for commit in replica.participant.unconfirmed(now_s)})
    assert held[0] == held[1]
    assert len(held[0]) == message_log.MAX_UNKNOWN_PEERS[Commit]
