"""Connected peers agree; liars, equivocators and silent members do not stop them."""

from dataclasses import replace

import pytest

from protocol.consensus_values import Cell, Signature
from protocol.identity import PeerId
from selector.consensus import inclusion
from selector.consensus.chain import (
    ABANDONED_EPOCHS,
    MAX_CANDIDATES,
    STALL_EPOCHS,
    Chain,
    InvalidStatement,
    quorum_size,
)
from selector.consensus.membership import MAX_ABSENCES
from selector.consensus.participant import Participant
from selector.consensus.sortition import MAX_CELLS_PER_PEER, MeasurementPlan, Sortition
from selector.consensus.state import State
from tests.support.agreement import CLOCK, GENESIS, HARDWARE, PLAN, Peer, Swarm, copy_entry, swarm_of, truth


def state_of(peer: Peer) -> State:
    state = peer.participant.state()
    assert state is not None
    return state


@pytest.mark.parametrize("count", [1, 2, 3, 4, 12])
def test_peers_agree_on_what_they_measure(count: int) -> None:
    swarm = swarm_of(count)
    for _ in range(8):
        swarm.play()
    assert len(swarm.heads()) == 1
    assert swarm.peers[0].participant.chain.head.epoch == 7
    state = state_of(swarm.peers[-1])
    assert state.peers() == tuple(peer.name for peer in swarm.peers)
    assert {cell: entry.value for cell, entry in state.table.items()} == {
        cell: truth(cell) for cell in PLAN.cells([HARDWARE])
    }
    assert all(entry.firm and entry.support == min(7, count) for entry in state.table.values())


def test_chains_of_two_peers_merge_when_the_second_joins() -> None:
    swarm = swarm_of(2)
    first, second = swarm.peers
    swarm.play([[first]])
    swarm.play([[first], [second]])
    assert len(swarm.heads()) == 2
    for _ in range(2):
        swarm.play()
    assert len(swarm.heads()) == 1
    assert state_of(second).peers() == (first.name, second.name)


def test_sortition_limits_the_cells_of_each_peer() -> None:
    swarm = swarm_of(3)
    swarm.play()
    for peer in swarm.peers:
        assert len(peer.participant.assigned(CLOCK.starts_s(swarm.epoch))) == MAX_CELLS_PER_PEER


def test_sortition_runs_once_in_an_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    swarm = swarm_of(3)
    swarm.play()
    epochs: list[int] = []
    draw = State.draw

    def counted(state: State, epoch: int, plan: MeasurementPlan) -> Sortition:
        epochs.append(epoch)
        return draw(state, epoch, plan)

    monkeypatch.setattr(State, "draw", counted)
    participant = swarm.peers[0].participant
    now_s = CLOCK.starts_s(swarm.epoch)
    assert participant.assigned(now_s) == participant.assigned(now_s + 1)
    assert epochs == [swarm.epoch]
    participant.assigned(CLOCK.starts_s(swarm.epoch + 1))
    assert epochs == [swarm.epoch, swarm.epoch + 1]


def test_liars_lose_reputation_and_the_cells_where_they_were_the_majority() -> None:
    def lie(cell: Cell) -> int:
        return -3_000_000 if cell.method == "slow" else truth(cell)

    peers = [Peer(f"peer-{number:03}", lie if number % 7 < 2 else truth) for number in range(14)]
    swarm = Swarm(peers)
    for _ in range(12):
        swarm.play()
    state = state_of(peers[0])
    weights = state.weights
    honest = [weights[peer.name] for peer in peers if peer.measure is truth]
    lying = [weights[peer.name] for peer in peers if peer.measure is lie]
    assert max(lying) < min(honest)
    assert all(entry.value == truth(cell) for cell, entry in state.table.items())


def test_without_a_quorum_the_head_stays() -> None:
    swarm = swarm_of(9)
    swarm.play()
    swarm.play()
    before = swarm.heads()
    assert len(before) == 1
    swarm.play([swarm.peers[:6]])
    assert swarm.heads(swarm.peers[:6]) == before
    swarm.play([swarm.peers[:7]])
    assert swarm.heads(swarm.peers[:7]) != before


def test_partition_heals_to_the_branch_with_the_quorum() -> None:
    swarm = swarm_of(10)
    for _ in range(2):
        swarm.play()
    for _ in range(2):
        swarm.play([swarm.peers[:7], swarm.peers[7:]])
    most, few = swarm.heads(swarm.peers[:7]), swarm.heads(swarm.peers[7:])
    assert most != few
    swarm.play()
    assert len(swarm.heads()) == 1
    path = {entry.id for entry in swarm.peers[-1].participant.chain.canonical()}
    assert most <= path


def test_stalled_chain_restarts_and_fork_choice_prefers_the_larger_half() -> None:
    swarm = swarm_of(10)
    for _ in range(2):
        swarm.play()
    halves = [swarm.peers[:6], swarm.peers[6:]]
    for _ in range(15):
        swarm.play(halves)
    larger, smaller = swarm.heads(halves[0]), swarm.heads(halves[1])
    assert larger != smaller
    assert state_of(halves[0][0]).peers() == tuple(peer.name for peer in halves[0])
    for _ in range(8):  # the others are candidates until their measurements are audited, and join one by one
        swarm.play()
    assert len(swarm.heads()) == 1
    assert larger <= {entry.id for entry in halves[1][0].participant.chain.canonical()}
    assert state_of(halves[0][0]).peers() == tuple(peer.name for peer in swarm.peers)


def test_stranger_cannot_restart_a_stalled_chain_before_it_is_abandoned() -> None:
    swarm = swarm_of(4)
    swarm.play()
    swarm.play()
    chain = swarm.peers[0].participant.chain
    head, stranger = chain.head, PeerId("stranger")
    for gap, refused in ((STALL_EPOCHS + 1, True), (ABANDONED_EPOCHS, True), (ABANDONED_EPOCHS + 1, False)):
        restart = replace(
            swarm.statements[-1], epoch=head.epoch + gap, parent=head.id, proposer=stranger, joined=(stranger,), left=()
        )
        if refused:
            with pytest.raises(InvalidStatement, match="non-members"):
                chain.add(restart)
        else:
            chain.add(restart)


def test_half_of_the_members_restart_a_stalled_chain_and_a_single_one_only_much_later() -> None:
    swarm = swarm_of(10)
    swarm.play()
    swarm.play()
    chain = swarm.peers[0].participant.chain
    head, names = chain.head, [peer.name for peer in swarm.peers]
    for present, gap, refused in ((4, 13, True), (5, 13, False), (1, 59, True), (1, 60, False)):
        restart = replace(
            swarm.statements[-1],
            epoch=head.epoch + gap,
            parent=head.id,
            proposer=names[0],
            joined=(),
            left=(),
            remaining=inclusion.pack(names[:present], head.members),
        )
        if refused:
            with pytest.raises(InvalidStatement, match="too few"):
                chain.add(restart)
        else:
            chain.add(restart)


def test_a_few_who_restart_a_chain_in_secret_do_not_outvote_the_others_by_signing_more_often() -> None:
    swarm = swarm_of(10)
    swarm.play()
    swarm.play()
    few, most = swarm.peers[:3], swarm.peers[3:]
    for number in range(80):
        swarm.play([few, most] if number < 2 else [few])
    assert state_of(few[0]).peers() == tuple(peer.name for peer in few)
    agreed = swarm.heads(most)
    swarm.play()
    path = {entry.id for entry in few[0].participant.chain.canonical()}
    assert agreed <= path


def test_a_member_alone_does_not_propose_a_restart_that_others_refuse() -> None:
    swarm = swarm_of(10)
    swarm.play()
    swarm.play()
    before, alone = swarm.heads(), swarm.peers[:1]
    for _ in range(20):
        swarm.play([alone])
    assert swarm.heads(alone) == before


def test_strangers_that_found_chains_of_their_own_do_not_take_memory_without_end() -> None:
    swarm = swarm_of(4)
    swarm.play()
    swarm.play()
    chain, first = swarm.peers[0].participant.chain, swarm.statements[0]
    head = chain.head
    for number in range(MAX_CANDIDATES + 50):
        stranger = PeerId(f"stranger-{number}")
        founding = replace(first, parent=GENESIS, proposer=stranger, joined=(stranger,), left=())
        chain.add(founding)
        chain.add_signature(Signature(GENESIS, founding.epoch, stranger, founding.id))
    assert chain.head is head
    assert len(chain.statement_ids()) < MAX_CANDIDATES + 10


def test_two_of_three_go_on_soon_after_the_third_has_gone() -> None:
    swarm = swarm_of(3)
    for _ in range(2):
        swarm.play()
    left = swarm.peers[:2]
    for _ in range(3):
        swarm.play([left])
    assert state_of(left[0]).peers() == tuple(peer.name for peer in left)


def test_absent_member_is_removed() -> None:
    swarm = swarm_of(8)
    swarm.play()
    for _ in range(MAX_ABSENCES):
        swarm.play([swarm.peers[:7]])
    assert swarm.peers[7].name not in state_of(swarm.peers[0]).peers()


def test_who_measures_nothing_does_not_wait_the_audit_out() -> None:
    swarm = swarm_of(6)

    def measured_sometimes(cell: Cell) -> int | None:
        return truth(cell) if swarm.epoch % 3 == 0 else None

    for peer in swarm.peers:
        peer.measure = measured_sometimes
    swarm.play()
    idle, diligent = Peer("idle", lambda _: None), Peer("diligent", measured_sometimes)
    swarm.peers += [idle, diligent]
    for _ in range(20):
        swarm.play()
    members = state_of(swarm.peers[0]).peers()
    assert diligent.name in members
    assert idle.name not in members
    for peer in swarm.peers:
        peer.measure = lambda _: None  # nobody uses the swarm any more
    for _ in range(8):
        swarm.play()
    assert idle.name in state_of(swarm.peers[0]).peers()


def test_proven_equivocator_is_expelled_for_good() -> None:
    swarm = swarm_of(6)
    swarm.play()
    cheat = swarm.peers[0]
    for peer in swarm.peers:
        peer.participant.on_equivocations([cheat.name], CLOCK.starts_s(1))
    for _ in range(3):
        swarm.play()
    state = state_of(swarm.peers[1])
    assert state.banned == (cheat.name,)
    assert cheat.name not in state.peers()
    assert len(swarm.heads()) == 1


def test_no_peer_votes_twice_in_an_epoch() -> None:
    swarm = swarm_of(5)
    for _ in range(6):
        swarm.play()
    votes = [(signature.epoch, signature.peer) for signature in swarm.signatures]
    assert len(votes) == len(set(votes))


def test_vote_refuses_a_statement_that_does_not_follow() -> None:
    swarm = swarm_of(4)
    swarm.play()
    now_s = CLOCK.starts_s(swarm.epoch) + 10
    contributions = [swarm.contribution(peer, now_s) for peer in swarm.peers]
    for peer in swarm.peers:
        for commit, reveal in contributions:
            peer.participant.on_commit(commit, now_s)
            peer.participant.on_reveal(reveal, now_s)
            peer.participant.confirm(commit)
    late_s = CLOCK.proposes_s(swarm.epoch, 3) + 1
    right = next(s for peer in swarm.peers if (s := peer.participant.propose(late_s)))
    forged = replace(right, table_digest=bytes(32))
    voter = next(peer for peer in swarm.peers if peer.name != right.proposer).participant
    for statement in (forged, right):
        voter.chain.add_signature(Signature(GENESIS, swarm.epoch, right.proposer, statement.id))
    voter.chain.add(forged)
    assert voter.vote(late_s) is None
    voter.chain.add(right)
    vote = voter.vote(late_s)
    assert vote is not None
    assert vote.statement == right.id


def test_member_without_any_message_of_the_epoch_refuses_an_empty_statement() -> None:
    swarm = swarm_of(4)
    swarm.play()
    swarm.play()
    voter = swarm.peers[0].participant
    state = state_of(swarm.peers[0])
    head, epoch = voter.chain.head, swarm.epoch
    proposer = next(peer for peer in state.draw(epoch, PLAN).committee if peer != voter.peer)
    empty = replace(
        swarm.statements[-1], epoch=epoch, parent=head.id, proposer=proposer, commits=(), joined=(), left=()
    )
    voter.chain.add(empty)
    voter.chain.add_signature(Signature(GENESIS, epoch, proposer, empty.id))
    assert voter.vote(CLOCK.proposes_s(epoch, 3) + 1) is None


def test_commit_after_the_reveal_phase_began_does_not_count() -> None:
    swarm = swarm_of(3)
    swarm.play()
    now_s = CLOCK.starts_s(swarm.epoch) + 10
    contributions = [swarm.contribution(peer, now_s) for peer in swarm.peers]
    judge = swarm.peers[0].participant
    for number, (commit, reveal) in enumerate(contributions):
        judge.on_commit(commit, now_s if number < 2 else CLOCK.reveals_begin_s(swarm.epoch) + 1)
        judge.confirm(commit)
        judge.on_reveal(reveal, CLOCK.reveals_begin_s(swarm.epoch) + 2)
    statement = judge.propose(CLOCK.proposes_s(swarm.epoch, 3))
    assert statement is not None
    assert {*statement.commits} == {each.id for each in contributions[:2]}


def test_commit_with_unavailable_observations_does_not_count() -> None:
    swarm = swarm_of(2)
    now_s = CLOCK.starts_s(0) + 10
    mine, others = (swarm.contribution(peer, now_s) for peer in swarm.peers)
    judge = swarm.peers[0].participant
    mine = mine._replace(reveal=judge.reveal(mine.reveal, CLOCK.reveals_begin_s(0)))
    judge.on_commit(others.commit, now_s)
    judge.on_reveal(others.reveal, now_s)
    assert judge.unconfirmed(now_s) == [others.commit]
    statement = judge.propose(CLOCK.proposes_s(0, 3))
    assert statement is not None
    assert statement.commits == (mine.id,)


def test_newcomer_verifies_the_chain_and_adopts_the_state_by_its_digest() -> None:
    swarm = swarm_of(4)
    for _ in range(4):
        swarm.play()
    newcomer = Participant(PeerId("newcomer"), Chain(GENESIS), CLOCK, PLAN)
    for entry in swarm.peers[0].participant.chain.canonical():
        copy_entry(entry, newcomer.chain)
    assert {newcomer.chain.head.id} == swarm.heads()
    assert newcomer.state() is None
    state = state_of(swarm.peers[0])
    forged = replace(state, measured={})
    assert not newcomer.adopt_state(forged)
    assert newcomer.adopt_state(state)
    assert newcomer.state() == state


def test_statement_without_a_quorum_is_not_canonical() -> None:
    swarm = swarm_of(7)
    swarm.play()
    swarm.play()
    newcomer = Chain(GENESIS)
    for entry in swarm.peers[0].participant.chain.canonical():
        copy_entry(entry, newcomer, [*sorted(entry.signers)[: quorum_size(7) - 1], PeerId("a stranger")])
    assert newcomer.head is newcomer.root


def test_checkpoint_outweighs_signatures_in_the_fork_choice() -> None:
    few, many = swarm_of(2), Swarm(Peer(f"sybil-{number}") for number in range(9))
    few.play()
    many.play()
    (checkpoint,) = few.heads()
    for pinned, heads in (((), many.heads()), ((checkpoint,), few.heads())):
        chain = Chain(GENESIS, pinned)
        for swarm in (few, many):
            for entry in swarm.peers[0].participant.chain.canonical():
                copy_entry(entry, chain)
        assert {chain.head.id} == heads


def test_fork_choice_counts_members_at_the_fork_before_newcomers() -> None:
    swarm = swarm_of(4)
    swarm.play()
    honest = swarm.peers[:3]
    sybils = [Peer(f"sybil-{number}") for number in range(12)]
    traitor = [swarm.peers[3], *sybils]
    for _ in range(16):
        swarm.play([honest, traitor])
    swarm.peers += sybils
    canonical = swarm.heads(honest)
    swarm.play()
    assert canonical <= {entry.id for entry in traitor[0].participant.chain.canonical()}


def test_statement_with_an_unknown_parent_or_foreign_chain_is_refused() -> None:
    swarm = swarm_of(2)
    swarm.play()
    swarm.play()
    last = swarm.statements[-1]
    chain = Chain(GENESIS)
    with pytest.raises(InvalidStatement, match="not known"):
        chain.add(last)
    foreign = Chain(bytes(32))
    with pytest.raises(InvalidStatement):
        foreign.add(last)
