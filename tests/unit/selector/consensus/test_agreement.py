"""Peers that hear one another agree; those that lie, cheat or fall silent do not stop them."""

from dataclasses import replace

import pytest

from selector.consensus.chain import Chain, InvalidStatement, quorum_of
from selector.consensus.participant import Participant
from selector.consensus.sortition import MAX_CELLS_PER_PEER, Agenda
from selector.consensus.state import MAX_ABSENCES, State
from selector.consensus.values import Cell, Signature
from tests.support.agreement import AGENDA, CLOCK, GENESIS, HARDWARE, Peer, Swarm, swarm_of, truth


def state_of(peer: Peer) -> State:
    state = peer.participant.state()
    assert state is not None
    return state


@pytest.mark.parametrize("count", [1, 2, 3, 4, 12])
def test_peers_agree_on_what_all_of_them_measure(count: int) -> None:
    swarm = swarm_of(count)
    for _ in range(8):
        swarm.play()
    assert len(swarm.heads()) == 1
    assert swarm.peers[0].participant.chain.head.epoch == 7
    state = state_of(swarm.peers[-1])
    assert state.peers() == tuple(peer.name for peer in swarm.peers)
    assert {cell: entry.value for cell, entry in state.table.items()} == {
        cell: truth(cell) for cell in AGENDA.cells([HARDWARE])
    }
    assert all(entry.firm and entry.support == min(7, count) for entry in state.table.values())


def test_a_second_peer_joins_one_that_was_alone_and_both_stand_by_one_chain() -> None:
    swarm = swarm_of(2)
    first, second = swarm.peers
    swarm.play([[first]])
    swarm.play([[first], [second]])
    assert len(swarm.heads()) == 2
    for _ in range(2):
        swarm.play()
    assert len(swarm.heads()) == 1
    assert state_of(second).peers() == (first.name, second.name)


def test_no_peer_measures_more_than_its_share_and_every_cell_is_measured() -> None:
    swarm = swarm_of(3)
    swarm.play()
    for peer in swarm.peers:
        assert len(peer.participant.assigned(CLOCK.starts_s(swarm.epoch))) == MAX_CELLS_PER_PEER


def test_what_is_to_be_measured_is_drawn_once_in_an_epoch_however_often_it_is_asked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    swarm = swarm_of(3)
    swarm.play()
    drawn: list[int] = []
    draw = State.assignments

    def counted(state: State, parent: bytes, epoch: int, agenda: Agenda) -> dict[Cell, tuple[str, ...]]:
        drawn.append(epoch)
        return draw(state, parent, epoch, agenda)

    monkeypatch.setattr(State, "assignments", counted)
    participant = swarm.peers[0].participant
    now_s = CLOCK.starts_s(swarm.epoch)
    assert participant.assigned(now_s) == participant.assigned(now_s + 1)
    assert drawn == [swarm.epoch]
    participant.assigned(CLOCK.starts_s(swarm.epoch + 1))
    assert drawn == [swarm.epoch, swarm.epoch + 1]


def test_liars_lose_their_weight_and_then_the_cells_in_which_they_were_the_majority() -> None:
    def lie(cell: Cell) -> int:
        return -3_000_000 if cell.method == "slow" else truth(cell)

    peers = [Peer(f"peer-{number:03}", lie if number % 10 < 3 else truth) for number in range(14)]
    swarm = Swarm(peers)
    for _ in range(12):
        swarm.play()
    state = state_of(peers[0])
    weights = state.weights
    honest = [weights[peer.name] for peer in peers if peer.measure is truth]
    lying = [weights[peer.name] for peer in peers if peer.measure is lie]
    assert max(lying) < min(honest)
    assert all(entry.value == truth(cell) for cell, entry in state.table.items())


def test_without_a_quorum_the_last_statement_stands() -> None:
    swarm = swarm_of(9)
    swarm.play()
    swarm.play()
    before = swarm.heads()
    assert len(before) == 1
    swarm.play([swarm.peers[:6]])
    assert swarm.heads(swarm.peers[:6]) == before
    swarm.play([swarm.peers[:7]])
    assert swarm.heads(swarm.peers[:7]) != before


def test_a_partition_heals_to_the_chain_with_the_quorum() -> None:
    swarm = swarm_of(10)
    for _ in range(2):
        swarm.play()
    for _ in range(2):
        swarm.play([swarm.peers[:7], swarm.peers[7:]])
    most, few = swarm.heads(swarm.peers[:7]), swarm.heads(swarm.peers[7:])
    assert most != few
    swarm.play()
    assert len(swarm.heads()) == 1
    path = {link.id for link in swarm.peers[-1].participant.chain.standing()}
    assert most <= path


def test_a_chain_that_lapsed_is_founded_again_and_the_larger_half_wins() -> None:
    swarm = swarm_of(10)
    for _ in range(2):
        swarm.play()
    halves = [swarm.peers[:6], swarm.peers[6:]]
    for _ in range(15):
        swarm.play(halves)
    larger, smaller = swarm.heads(halves[0]), swarm.heads(halves[1])
    assert larger != smaller
    assert state_of(halves[0][0]).peers() == tuple(peer.name for peer in halves[0])
    swarm.play()
    swarm.play()
    assert len(swarm.heads()) == 1
    assert larger <= {link.id for link in halves[1][0].participant.chain.standing()}
    assert state_of(halves[0][0]).peers() == tuple(peer.name for peer in swarm.peers)


def test_two_of_three_go_on_soon_after_the_third_has_gone() -> None:
    swarm = swarm_of(3)
    for _ in range(2):
        swarm.play()
    left = swarm.peers[:2]
    for _ in range(3):
        swarm.play([left])
    assert state_of(left[0]).peers() == tuple(peer.name for peer in left)


def test_a_member_that_stays_silent_is_one_no_longer() -> None:
    swarm = swarm_of(8)
    swarm.play()
    for _ in range(MAX_ABSENCES):
        swarm.play([swarm.peers[:7]])
    assert swarm.peers[7].name not in state_of(swarm.peers[0]).peers()


def test_a_proven_equivocator_is_expelled_and_does_not_come_back() -> None:
    swarm = swarm_of(6)
    swarm.play()
    cheat = swarm.peers[0]
    for peer in swarm.peers:
        peer.participant.hear_offence(cheat.name)
    for _ in range(3):
        swarm.play()
    state = state_of(swarm.peers[1])
    assert state.expelled == (cheat.name,)
    assert cheat.name not in state.peers()
    assert len(swarm.heads()) == 1


def test_nobody_signs_two_statements_of_an_epoch() -> None:
    swarm = swarm_of(5)
    for _ in range(6):
        swarm.play()
    votes = [(signature.epoch, signature.peer) for signature in swarm.signatures]
    assert len(votes) == len(set(votes))


def test_a_statement_that_does_not_follow_from_the_contributions_is_signed_by_nobody() -> None:
    swarm = swarm_of(4)
    swarm.play()
    now_s = CLOCK.starts_s(swarm.epoch) + 10
    said = [swarm.contribution(peer, now_s) for peer in swarm.peers]
    for peer in swarm.peers:
        for commit, reveal in said:
            peer.participant.hear_commit(commit, now_s)
            peer.participant.hear_reveal(reveal, now_s)
            peer.participant.confirm(commit)
    late_s = CLOCK.proposes_s(swarm.epoch, 3) + 1
    right = next(s for peer in swarm.peers if (s := peer.participant.propose(late_s)))
    forged = replace(right, table_digest=bytes(32))
    voter = next(peer for peer in swarm.peers if peer.name != right.proposer).participant
    for statement in (forged, right):
        voter.hear_signature(Signature(swarm.epoch, right.proposer, statement.id))
    voter.hear_statement(forged)
    assert voter.vote(late_s) is None
    voter.hear_statement(right)
    vote = voter.vote(late_s)
    assert vote is not None
    assert vote.statement == right.id


def test_a_commit_that_came_when_others_had_revealed_does_not_count() -> None:
    swarm = swarm_of(3)
    swarm.play()
    now_s = CLOCK.starts_s(swarm.epoch) + 10
    said = [swarm.contribution(peer, now_s) for peer in swarm.peers]
    judge = swarm.peers[0].participant
    for number, (commit, reveal) in enumerate(said):
        judge.hear_commit(commit, now_s if number < 2 else CLOCK.reveals_begin_s(swarm.epoch) + 1)
        judge.confirm(commit)
        judge.hear_reveal(reveal, CLOCK.reveals_begin_s(swarm.epoch) + 2)
    statement = judge.propose(CLOCK.proposes_s(swarm.epoch, 3))
    assert statement is not None
    assert said[2].commit.id not in statement.commits
    assert len(statement.commits) == 2


def test_what_names_observations_that_are_not_at_hand_does_not_count() -> None:
    swarm = swarm_of(2)
    now_s = CLOCK.starts_s(0) + 10
    mine, others = (swarm.contribution(peer, now_s) for peer in swarm.peers)
    judge = swarm.peers[0].participant
    judge.hear_commit(others.commit, now_s)
    judge.hear_reveal(others.reveal, now_s)
    assert judge.unconfirmed(now_s) == [others.commit]
    statement = judge.propose(CLOCK.proposes_s(0, 3))
    assert statement is not None
    assert statement.commits == (mine.commit.id,)


def test_a_newcomer_verifies_the_chain_from_genesis_and_takes_the_state_from_anybody() -> None:
    swarm = swarm_of(4)
    for _ in range(4):
        swarm.play()
    newcomer = Participant("newcomer", Chain(GENESIS), CLOCK, AGENDA)
    for link in swarm.peers[0].participant.chain.standing():
        assert link.statement is not None
        newcomer.hear_statement(link.statement)
        for signer in link.signatures:
            newcomer.hear_signature(Signature(link.epoch, signer, link.id))
    assert {newcomer.chain.head.id} == swarm.heads()
    assert newcomer.state() is None
    state = state_of(swarm.peers[0])
    forged = State(state.epoch, state.members, {}, state.expelled, state.set_digest)
    assert not newcomer.learn_state(forged)
    assert newcomer.learn_state(state)
    assert newcomer.state() == state


def test_a_statement_with_too_few_signatures_is_not_adopted() -> None:
    swarm = swarm_of(7)
    swarm.play()
    swarm.play()
    links = swarm.peers[0].participant.chain.standing()
    newcomer = Chain(GENESIS)
    for link in links:
        assert link.statement is not None
        newcomer.add(link.statement)
        for signer in sorted(link.signatures)[: quorum_of(7) - 1]:
            newcomer.sign(Signature(link.epoch, signer, link.id))
        newcomer.sign(Signature(link.epoch, "a stranger", link.id))
    assert newcomer.head is newcomer.root


def test_a_pinned_checkpoint_outweighs_any_number_of_signatures() -> None:
    few, many = swarm_of(2), Swarm(Peer(f"sybil-{number}") for number in range(9))
    few.play()
    many.play()
    (checkpoint,) = few.heads()
    for pinned, heads in (((), many.heads()), ((checkpoint,), few.heads())):
        chain = Chain(GENESIS, pinned)
        for swarm in (few, many):
            for link in swarm.peers[0].participant.chain.standing():
                assert link.statement is not None
                chain.add(link.statement)
                for signer in link.signatures:
                    chain.sign(Signature(link.epoch, signer, link.id))
        assert {chain.head.id} == heads


def test_members_at_the_fork_decide_and_not_those_that_one_branch_has_made() -> None:
    swarm = swarm_of(4)
    swarm.play()
    honest = swarm.peers[:3]
    sybils = [Peer(f"sybil-{number}") for number in range(12)]
    traitor = [swarm.peers[3], *sybils]
    for _ in range(16):
        swarm.play([honest, traitor])
    swarm.peers += sybils
    standing = swarm.heads(honest)
    swarm.play()
    assert standing <= {link.id for link in traitor[0].participant.chain.standing()}


def test_a_statement_out_of_place_is_refused() -> None:
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
