"""Participants of a consensus that hear one another at once, and what they measure."""

import itertools
from collections.abc import Callable, Iterable, Sequence

from selector.consensus.chain import Chain, InvalidStatement
from selector.consensus.clock import EpochClock
from selector.consensus.participant import Participant
from selector.consensus.sortition import Agenda
from selector.consensus.state import Contribution
from selector.consensus.values import Cell, Reading, Signature, Statement, genesis_of

CLOCK = EpochClock(100.0)
AGENDA = Agenda(("short", "long"), ("fast", "slow", "odd"))
GENESIS = genesis_of(b"swarm", "model", "rules")
HARDWARE = "two cores"

Measure = Callable[[Cell], int | None]


def truth(cell: Cell) -> int:
    """Return what an honest peer measures."""
    return {"fast": -1_000_000, "slow": 700_000, "odd": 0}[cell.method] + 10_000 * len(cell.workload)


class Peer:
    """A participant and what it does when it measures."""

    def __init__(self, name: str, measure: Measure = truth, agenda: Agenda = AGENDA) -> None:
        self.name = name
        self.measure = measure
        self.participant = Participant(name, Chain(GENESIS), CLOCK, agenda)


class Swarm:
    """Peers in groups; within a group everybody hears everything at once, and nothing from outside."""

    def __init__(self, peers: Iterable[Peer]) -> None:
        self.peers = list(peers)
        self.epoch = 0
        self.statements: list[Statement] = []
        self.signatures: list[Signature] = []
        self._nonces = itertools.count()

    def play(self, groups: Sequence[Sequence[Peer]] | None = None) -> None:
        """Live through one epoch."""
        for group in groups if groups is not None else [self.peers]:
            self._play(group)
        self.epoch += 1

    def _play(self, group: Sequence[Peer]) -> None:
        commits_s = CLOCK.starts_s(self.epoch) + 10
        self._catch_up(group)
        said = [self.contribution(peer, commits_s) for peer in group]
        for peer in group:
            for commit, reveal in said:
                peer.participant.hear_commit(commit, commits_s)
                peer.participant.confirm(commit)
                peer.participant.hear_reveal(reveal, CLOCK.reveals_begin_s(self.epoch))
        for turn in range(CLOCK.turns()):
            now_s = CLOCK.proposes_s(self.epoch, turn) + 0.5
            for statement in [s for peer in group if (s := peer.participant.propose(now_s))]:
                self.statements.append(statement)
                for peer in group:
                    peer.participant.hear_statement(statement)
            for _ in ("its proposer", "and then the others"):
                for signature in [v for peer in group if (v := peer.participant.vote(now_s))]:
                    self.signatures.append(signature)
                    for peer in group:
                        peer.participant.hear_signature(signature)
        self._catch_up(group)

    def contribution(self, peer: Peer, now_s: float) -> Contribution:
        """Return what a peer says in this epoch."""
        values = {cell: peer.measure(cell) for cell in peer.participant.assigned(now_s)}
        readings = [Reading(cell, value) for cell, value in values.items() if value is not None]
        return peer.participant.contribute(now_s, HARDWARE, readings, (), b"%016d" % next(self._nonces))

    def _catch_up(self, group: Sequence[Peer]) -> None:
        """Exchange what some of a group know and others do not, as anti-entropy does."""
        links = {link.id: link for peer in group for link in peer.participant.chain.quorate()}
        states = [state for peer in group if (state := peer.participant.state())]
        for peer in group:
            for link in sorted(links.values(), key=lambda link: link.epoch):
                assert link.statement is not None
                try:
                    peer.participant.hear_statement(link.statement)
                except InvalidStatement as error:
                    raise AssertionError(f"{peer.name}: {error}") from None
                for signer in link.signatures:
                    peer.participant.hear_signature(Signature(link.epoch, signer, link.id))
            for state in states:
                peer.participant.learn_state(state)

    def heads(self, peers: Sequence[Peer] | None = None) -> set[bytes]:
        """Return the heads that peers stand by."""
        return {peer.participant.chain.head.id for peer in peers or self.peers}


def swarm_of(count: int, measure: Measure = truth) -> Swarm:
    """Return a swarm of equal peers."""
    return Swarm(Peer(f"peer-{number:03}", measure) for number in range(count))
