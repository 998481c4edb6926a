"""A node reveals with one inclusion list, also across restarts, and never claims hardware that it does not have."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
import trio

from node.consensus.contribution import Contributor
from node.identity import Identity
from node.storage.chain_store import Uncommitted
from protocol.consensus import Body, SignedMessage, sign_message
from protocol.consensus_values import Reveal
from protocol.identity import PeerId
from selector.consensus.chain import Chain
from selector.consensus.participant import Participant
from tests.support.agreement import CLOCK, GENESIS, HARDWARE, PLAN, Peer, Swarm, copy_entry, swarm_of

OWN = Identity(b"7" * 32)
COMMITS_END_S = CLOCK.commits_end_s(1) + 1
REVEALS_S = CLOCK.reveals_begin_s(1) + 1


class Store:
    async def uncommitted(self, *_: object) -> Uncommitted:
        await trio.lowlevel.checkpoint()
        return Uncommitted((), 0)


def member() -> Participant:
    """Return the only member of a chain, in epoch 1."""
    swarm = Swarm([Peer(OWN.peer_id)])
    swarm.play()
    return swarm.peers[0].participant


def contributor(participant: Participant, hardware: str = HARDWARE) -> Contributor:
    def sign(body: Body) -> SignedMessage:
        return sign_message(body, OWN.private_key)

    environment = SimpleNamespace(
        identity=OWN,
        store=Store(),
        hardware=lambda: hardware,
        nonce=lambda: b"n" * 32,
        wall_clock=lambda: COMMITS_END_S,
    )
    replica = SimpleNamespace(participant=participant, chain=participant.chain, sign=sign)
    return Contributor(cast("Any", environment), cast("Any", replica), cast("Any", None))


@pytest.mark.parametrize("hardware", [HARDWARE, "another class"])
async def test_node_whose_hardware_changed_contributes_nothing(hardware: str) -> None:
    made = await contributor(member(), hardware).contribution(COMMITS_END_S)
    assert (made is not None) == (hardware == HARDWARE)


async def test_restarted_node_repeats_the_list_that_it_may_have_published() -> None:
    first = contributor(member())
    made = await first.contribution(COMMITS_END_S)
    assert made is not None
    first.schedule_reveal(made)
    [published] = first.due_reveals(REVEALS_S)
    assert isinstance(published.body, Reveal)
    assert isinstance(made.reveal.body, Reveal)
    assert published.body == replace(made.reveal.body, inclusion=b"\x01")
    for saved in ([made.commit, made.reveal, published], [published, made.reveal, made.commit]):
        restarted = contributor(member())
        for message in saved:
            restarted.restore(message, COMMITS_END_S)
        assert restarted.due_reveals(REVEALS_S + 1) == [published]


async def test_node_that_lost_messages_neither_commits_nor_reveals_in_their_epoch() -> None:
    first = contributor(member())
    made = await first.contribution(COMMITS_END_S)
    assert made is not None
    again = member()
    again.signed.closed.add(1)
    restarted = contributor(again)
    for message in (made.commit, made.reveal):
        restarted.restore(message, COMMITS_END_S)
    assert restarted.due_reveals(REVEALS_S) == []
    again = member()
    again.signed.closed.add(1)
    restarted = contributor(again)
    assert await restarted.contribution(COMMITS_END_S) is None


async def test_newcomer_commits_however_many_strangers_have() -> None:
    swarm = swarm_of(4)
    swarm.play()
    newcomer = Participant(OWN.peer_id, Chain(GENESIS), CLOCK, PLAN)
    for entry in swarm.peers[0].participant.chain.canonical():
        copy_entry(entry, newcomer.chain)
    state = swarm.peers[0].participant.state()
    assert state is not None
    assert newcomer.adopt_state(state)
    for number in range(500):
        stranger = Participant(PeerId(f"stranger-{number}"), newcomer.chain, CLOCK, PLAN)
        newcomer.on_commit(stranger.contribute(COMMITS_END_S, HARDWARE, [], [], bytes(32)).commit, COMMITS_END_S)
    assert await contributor(newcomer).contribution(COMMITS_END_S) is not None
