"""A swarm of consensus participants whose messages arrive at once, and their measurements."""

import itertools
from collections.abc import Callable, Iterable, Sequence

import trio

from protocol.consensus_values import Cell, Reading, Signature, Statement, genesis_of
from protocol.identity import PeerId
from selector.consensus.chain import Chain, ChainEntry, InvalidStatement
from selector.consensus.clock import EpochClock
from selector.consensus.participant import Participant
from selector.consensus.sortition import MeasurementPlan
from selector.consensus.state import Contribution

CLOCK = EpochClock(100.0)
PLAN = MeasurementPlan(("short", "long"), ("fast", "slow", "odd"))
GENESIS = genesis_of(b"swarm", "model", "rules")
HARDWARE = "two cores"

Measure = Callable[[Cell], int | None]


def truth(cell: Cell) -> int:
    """Return the reading of an honest peer."""
    return {"fast": -1_000_000, "slow": 700_000, "odd": 0}[cell.method] + 10_000 * len(cell.workload)


class IdleMeter:
    """Measures nothing, and withholds nothing; see Meter."""

    async def measure(self, cell: Cell) -> float | None:
        """Return no reading; see Meter."""
        del cell
        await trio.lowlevel.checkpoint()
        return None

    async def revealed(self) -> None:
        """Publish nothing; see Meter."""
        await trio.lowlevel.checkpoint()

    def withheld(self) -> list[bytes]:
        """Return nothing; see Meter."""
        return []

    def restore(self, envelopes: Sequence[bytes]) -> None:
        """Refuse what was never withheld; see Meter."""
        raise AssertionError(envelopes)


class Peer:
    """A participant and its measurements."""

    def __init__(self, name: str, measure: Measure = truth, plan: MeasurementPlan = PLAN) -> None:
        self.name = PeerId(name)
        self.measure = measure
        self.participant = Participant(self.name, Chain(GENESIS), CLOCK, plan)


class Swarm:
    """Peers in groups, between which no message gets through."""

    def __init__(self, peers: Iterable[Peer]) -> None:
        self.peers = list(peers)
        self.epoch = 0
        self.statements: list[Statement] = []
        self.signatures: list[Signature] = []
        self._nonces = itertools.count()

    def play(self, groups: Sequence[Sequence[Peer]] | None = None) -> None:
        """Run one epoch."""
        for group in groups if groups is not None else [self.peers]:
            self._play(group)
        self.epoch += 1

    def _play(self, group: Sequence[Peer]) -> None:
        commits_s = CLOCK.starts_s(self.epoch) + 10
        self._catch_up(group)
        self.exchange(group, [self.contribution(peer, commits_s) for peer in group], commits_s)
        for turn in range(CLOCK.turns()):
            now_s = CLOCK.proposes_s(self.epoch, turn) + 0.5
            for statement in [s for peer in group if (s := peer.participant.propose(now_s))]:
                self.statements.append(statement)
                for peer in group:
                    peer.participant.chain.add(statement)
            for _ in ("its proposer", "and then the others"):
                for signature in [v for peer in group if (v := peer.participant.vote(now_s))]:
                    self.signatures.append(signature)
                    for peer in group:
                        peer.participant.chain.add_signature(signature)
        self._catch_up(group)

    def exchange(self, group: Sequence[Peer], contributions: Sequence[Contribution], commits_s: float) -> None:
        """Deliver all commits, then all reveals with their inclusion lists, within a group."""
        reveals_s = CLOCK.reveals_begin_s(self.epoch)
        for peer in group:
            for commit, _ in contributions:
                peer.participant.on_commit(commit, commits_s)
                peer.participant.confirm(commit)
        by_name = {peer.name: peer.participant for peer in group}
        reveals = [by_name[each.commit.peer].reveal(each.reveal, reveals_s) for each in contributions]
        for peer in group:
            for reveal in reveals:
                peer.participant.on_reveal(reveal, reveals_s)

    def contribution(self, peer: Peer, now_s: float) -> Contribution:
        """Return the contribution of a peer to this epoch."""
        values = {cell: peer.measure(cell) for cell in peer.participant.assigned(now_s)}
        readings = [Reading(cell, value) for cell, value in values.items() if value is not None]
        return peer.participant.contribute(now_s, HARDWARE, readings, (), b"%016d" % next(self._nonces))

    def _catch_up(self, group: Sequence[Peer]) -> None:
        """Exchange statements, signatures and states within a group, as anti-entropy does."""
        entries = {entry.id: entry for peer in group for entry in quorate(peer.participant.chain)}
        states = [state for peer in group if (state := peer.participant.state())]
        for peer in group:
            for entry in sorted(entries.values(), key=lambda entry: entry.epoch):
                try:
                    copy_entry(entry, peer.participant.chain)
                except InvalidStatement as error:
                    raise AssertionError(f"{peer.name}: {error}") from None
            for state in states:
                peer.participant.adopt_state(state)

    def heads(self, peers: Sequence[Peer] | None = None) -> set[bytes]:
        """Return the heads of peers."""
        return {peer.participant.chain.head.id for peer in peers or self.peers}


def swarm_of(count: int, measure: Measure = truth) -> Swarm:
    """Return a swarm of equal peers."""
    return Swarm(Peer(f"peer-{number:03}", measure) for number in range(count))


def quorate(chain: Chain) -> list[ChainEntry]:
    """Return all entries with a quorum except the root, parents before children."""
    found: list[ChainEntry] = []
    waiting = [chain.root]
    while waiting:
        children = [child for child in waiting.pop().children if child.has_quorum]
        found += children
        waiting += children
    return found


def copy_entry(entry: ChainEntry, chain: Chain, signers: Iterable[PeerId] | None = None) -> None:
    """Add an entry to another chain, with the signatures of `signers`, or all."""
    assert entry.statement is not None
    chain.add(entry.statement)
    for signer in entry.signers if signers is None else signers:
        chain.add_signature(Signature(GENESIS, entry.epoch, signer, entry.id))
