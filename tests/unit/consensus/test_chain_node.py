"""A keeper outlives damage to what it kept, and whoever floods it with the past."""

from collections.abc import Sequence

import pytest
import trio
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from node.consensus import message_log
from node.consensus.chain_node import ChainNode
from node.consensus.chain_sync import MAX_ROUNDS, ChainResponder
from node.identity import Identity
from node.replication.session import Throttle
from node.testing.chain_store import MemoryStore
from node.testing.memory_history import MemoryHistory
from node.util.offload import run_inline
from protocol.chains import PROTOCOL_ID, ChainConnection, GetStatements, Remaining
from protocol.consensus import Said, SignatureRecord, StatementRecord, say
from protocol.errors import RemoteProtocolError
from protocol.identity import PeerId, peer_id_from_public_key
from protocol.states import Role
from selector.consensus.values import Cell
from tests.support.agreement import AGENDA, CLOCK, GENESIS, HARDWARE

EPOCH = 1000


class Meter:
    async def measure(self, cell: Cell) -> float | None:
        del cell
        await trio.lowlevel.checkpoint()
        return None

    async def revealed(self) -> None:
        await trio.lowlevel.checkpoint()


def keeper_of(store: MemoryStore) -> ChainNode:
    def publish(said: Sequence[Said]) -> None:
        del said

    return ChainNode(
        identity=Identity(b"7" * 32),
        genesis=GENESIS,
        clock=CLOCK,
        agenda=AGENDA,
        store=store,
        history=MemoryHistory(),
        meter=Meter(),
        hardware=lambda: HARDWARE,
        participates=lambda: False,
        publish=publish,
        wall_clock=lambda: CLOCK.starts_s(EPOCH),
        offload=run_inline,
    )


def key(number: int) -> Ed25519PrivateKey:
    return Ed25519PrivateKey.from_private_bytes(number.to_bytes(32, "big"))


def founding(number: int, epoch: int) -> Said:
    """Return a statement by which a stranger makes itself the only member."""
    digest = bytes(32)
    own = peer_id_from_public_key(key(number).public_key().public_bytes_raw())
    body = StatementRecord(
        chain=GENESIS,
        epoch=epoch,
        parent=GENESIS,
        commits=(),
        joined=(PeerId(own),),
        left=(),
        expelled=(),
        set_digest=digest,
        table_digest=digest,
        state_digest=digest,
    )
    return say(body, key(number))


async def test_a_damaged_record_of_our_own_does_not_end_the_node_but_nothing_is_signed_in_that_epoch() -> None:
    store = MemoryStore()
    vote = say(SignatureRecord(chain=GENESIS, epoch=EPOCH - 1, statement=bytes(32)), Identity(b"7" * 32).private_key)
    await store.keep_records(GENESIS, [(b"vote", EPOCH - 1, vote.envelope), (b"damaged", EPOCH, b"\0")], 0)
    keeper = keeper_of(store)
    await keeper.load()
    assert keeper.participant.voted_epoch == EPOCH


async def test_a_statement_may_find_its_quorum_after_a_flood_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(message_log, "MAX_EVIDENCE", 16)
    keeper = keeper_of(MemoryStore())
    first = founding(1, 3)
    keeper.hear([first])
    await keeper.turn()
    for number in range(2, 100):
        unknown = SignatureRecord(chain=GENESIS, epoch=number, statement=number.to_bytes(32, "big"))
        keeper.hear([founding(number, 3), say(unknown, key(number))])
    await keeper.turn()
    assert len(keeper.minutes.signatures) <= 2 * 16
    keeper._forget(CLOCK.starts_s(EPOCH))
    [statement] = [each for each, said in keeper.minutes.statements.items() if said == first]
    keeper.hear([say(SignatureRecord(chain=GENESIS, epoch=3, statement=statement), key(1))])
    await keeper.turn()
    assert [each.id for each in await keeper.store.statements(GENESIS)] == [statement]


async def test_who_is_not_in_the_committee_takes_no_room_of_those_who_are() -> None:
    keeper = keeper_of(MemoryStore())
    keeper.hear([founding(1, EPOCH)])
    await keeper.turn()
    [statement] = keeper.minutes.statements
    signature = SignatureRecord(chain=GENESIS, epoch=EPOCH, statement=statement)
    signed = [say(signature, key(number)) for number in (3, 2, 1)]
    keeper.hear(signed)
    await keeper.turn()
    assert [*keeper.minutes.signatures[statement].values()] == signed[2:]


class Questioner:
    """The stream of a peer that asks again whatever it was answered."""

    peer, protocol = PeerId("questioner"), PROTOCOL_ID

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
    chain = keeper_of(MemoryStore())
    stream = Questioner()
    with pytest.raises(RemoteProtocolError, match="more than"):
        await ChainResponder(stream, Throttle(), lambda genesis: chain).run()
    assert stream.asked == MAX_ROUNDS + 3
