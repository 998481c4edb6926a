"""A clock that was wrong for a while stops no consensus, and makes no node sign twice."""

from collections.abc import Sequence

import pytest
import trio

from node.consensus import chain_recovery
from node.consensus.chain_node import ChainNode
from node.consensus.environment import ConsensusEnvironment, ConsensusRules
from node.identity import Identity
from node.storage.chain_store import ChainStore
from node.testing.chain_store import memory_chain_store
from node.testing.memory_history import MemoryHistory
from node.util.offload import run_in_thread
from protocol.consensus import SignedMessage, is_equivocation, verify_message
from protocol.consensus_values import Commit, Signature
from selector.consensus import chain as chains
from selector.consensus.participant import MAX_STATES, Participant
from tests.support.agreement import CLOCK, GENESIS, HARDWARE, PLAN, IdleMeter

EPOCH = 1000
FAR = EPOCH + 52_560
PHASES = (0.61, 0.71, 0.81, 0.87, 0.92, 0.97)


def in_event_loop() -> bool:
    """Return True; fail in a thread, as what is known of peers' clocks does."""
    return trio.current_time() >= 0


class Node:
    """A node of which the clock, the disk and the process are apart."""

    def __init__(self, number: int) -> None:
        self.identity = Identity(bytes([number]) * 32)
        self.store: ChainStore = memory_chain_store()
        self.signed: list[SignedMessage] = []
        self.now_s = 0.0
        self.clock_agrees: bool | None = None
        self.process = self._process()

    def _process(self) -> ChainNode:
        environment = ConsensusEnvironment(
            identity=self.identity,
            store=self.store,
            history=MemoryHistory(),
            models=dict,
            hardware=lambda: HARDWARE,
            meter=lambda _: IdleMeter(),
            wall_clock=lambda: self.now_s,
            offload=run_in_thread,
            clock_agrees=lambda: self.clock_agrees,
        )
        rules = ConsensusRules(swarm=b"swarm", plan=PLAN, clock=CLOCK)
        return ChainNode(
            environment,
            rules,
            GENESIS,
            IdleMeter(),
            participates=lambda: True,
            publish=lambda each: self.signed.extend(each),
        )

    async def restart(self, epoch: int) -> None:
        self.now_s = CLOCK.starts_s(epoch) + 1
        self.process = self._process()
        await self.process.load()

    @property
    def participant(self) -> Participant:
        return self.process.replica.participant

    @property
    def head_epoch(self) -> int:
        return self.participant.chain.head.epoch

    def votes(self) -> set[int]:
        return {each.epoch for each in self.signed if isinstance(each.body, Signature)}


async def play(nodes: Sequence[Node], first: int, last: int | None = None) -> None:
    """Let nodes take part in epochs by the same clock; all of them get what any of them signs."""
    for epoch in range(first, (last or first) + 1):
        for phase in PHASES:
            for node in nodes:
                node.now_s = (epoch + phase) * CLOCK.epoch_s
            for _ in range(4):
                for node in nodes:
                    node.signed, sent = [], node.signed
                    await node.process.turn()
                    node.signed, new = [*sent, *node.signed], node.signed
                    for other in nodes:
                        if other is not node:
                            other.process.receive(new)


async def synchronise(source: Node, target: Node) -> None:
    """Fetch the branch of one node to another, with the state after it."""
    for each in await source.process.branch_after([GENESIS], 1000):
        target.process.receive(verify_message(envelope) for envelope in (each.envelope, *each.signatures))
    await target.process.turn()
    if (head := await target.process.head_without_state()) is not None:
        assert await target.process.adopt_state(await source.process.parts_after(head))


@pytest.mark.parametrize("restarts", [False, True], ids=["process goes on", "restarted"])
async def test_node_votes_and_proposes_again_once_its_clock_is_right(*, restarts: bool) -> None:
    node = Node(1)
    await node.restart(FAR - 1)
    await play([node], FAR)
    assert node.head_epoch == FAR
    if restarts:
        await node.restart(EPOCH)
    await play([node], EPOCH, EPOCH + 3)
    assert node.head_epoch == EPOCH + 3
    assert {FAR, *range(EPOCH, EPOCH + 4)} == node.votes()


@pytest.mark.parametrize("restarts", [False, True], ids=["process goes on", "restarted"])
async def test_chain_goes_on_from_where_it_was_before_the_clock_was_wrong(*, restarts: bool) -> None:
    node = Node(1)
    await node.restart(EPOCH - 2)
    await play([node], EPOCH, EPOCH + 1)
    before = node.participant.chain.head.id
    await play([node], FAR, FAR + MAX_STATES + 1)
    if restarts:
        await node.restart(EPOCH + 2)
    await play([node], EPOCH + 2, EPOCH + 6)
    assert node.head_epoch == EPOCH + 6
    assert before in {entry.id for entry in node.participant.chain.canonical()}
    await node.restart(EPOCH + 7)
    assert node.head_epoch == EPOCH + 6
    assert node.participant.state() is not None


async def test_chain_goes_on_from_before_its_clock_was_wrong_although_the_node_was_off_meanwhile() -> None:
    node = Node(1)
    await node.restart(EPOCH - 2)
    await play([node], EPOCH, EPOCH + 1)
    before = node.participant.chain.head.id
    for gap in (0, 10, 20):
        await node.restart(FAR + gap)
        await play([node], FAR + gap, FAR + gap + 1)
    await node.restart(EPOCH + 2)
    await play([node], EPOCH + 2, EPOCH + 4)
    assert node.head_epoch == EPOCH + 4
    assert before in {entry.id for entry in node.participant.chain.canonical()}


@pytest.mark.parametrize("restarts", [False, True], ids=["process goes on", "restarted"])
async def test_node_whose_clock_was_wrong_signs_with_the_members_it_joins(*, restarts: bool) -> None:
    wrong, *healthy = (Node(number) for number in (1, 2, 3))
    await wrong.restart(FAR - 1)
    await play([wrong], FAR, FAR + 2)
    for node in healthy:
        await node.restart(EPOCH - 2)
    await play(healthy, EPOCH, EPOCH + 5)
    if restarts:
        await wrong.restart(EPOCH + 5)
    await play([wrong], EPOCH + 5)
    await synchronise(healthy[0], wrong)
    await synchronise(wrong, healthy[1])
    await play([wrong, *healthy], EPOCH + 6, EPOCH + 16)
    heads = {node.participant.chain.head.id for node in (wrong, *healthy)}
    assert len(heads) == 1
    assert wrong.head_epoch == EPOCH + 16
    assert len(wrong.participant.chain.head.members) == 3
    assert EPOCH + 16 in wrong.votes()


@pytest.mark.parametrize("restarts", [False, True], ids=["process goes on", "restarted"])
async def test_node_never_contradicts_itself_however_its_clock_is_set(*, restarts: bool) -> None:
    node = Node(1)
    await node.restart(EPOCH - 2)
    await play([node], EPOCH)
    for epoch in (EPOCH + 1, FAR, EPOCH + 1, EPOCH, FAR, EPOCH + 2, EPOCH + 1, EPOCH + 3):
        if restarts:
            await node.restart(epoch)
        await play([node], epoch)
    assert node.votes() == {*range(EPOCH, EPOCH + 4), FAR}
    assert sum(isinstance(each.body, Commit) for each in node.signed) >= len(node.votes())
    assert not any(is_equivocation(one, other) for one in node.signed for other in node.signed)


async def test_chain_behind_final_statements_of_the_future_begins_anew_once_peers_confirm_the_clock(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for module in (chains, chain_recovery):
        monkeypatch.setattr(module, "RETAINED_ENTRIES", 2)
    node = Node(1)
    await node.restart(FAR - 1)
    await play([node], FAR, FAR + 5)
    await node.restart(EPOCH)
    await play([node], EPOCH)
    assert node.votes() == {*range(FAR, FAR + 6)}, "the clock may be behind"
    node.clock_agrees = True
    await play([node], EPOCH + 1, EPOCH + 2)
    assert node.head_epoch == EPOCH + 2
    await node.restart(EPOCH + 3)
    assert [entry.epoch for entry in node.participant.chain.canonical()] == [EPOCH + 1, EPOCH + 2]


async def test_statements_stay_on_disk_while_the_clock_is_behind() -> None:
    node = Node(1)
    await node.restart(EPOCH - 2)
    await play([node], EPOCH, EPOCH + 3)
    await node.restart(EPOCH - 50)
    assert await node.process.branch_after([GENESIS], 10) == [], "others would not follow them yet"
    await node.process.turn()
    await node.restart(EPOCH + 3)
    assert node.head_epoch == EPOCH + 3
    assert node.participant.state() is not None
