"""No coalition of a third of the members captures the consensus, whatever it withholds, leaves out or makes up.

All honest peers run the daemon's own state machine. Hostile ones know everything, collude, and see each other's and all
honest messages first. Messages between honest peers arrive in time.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property
from random import Random
from typing import Any

import pytest

from node.stages.voter import Agreement
from protocol.consensus_values import MAX_JOINED, VALUE_SCALE, Cell, Reading, Reveal, Signature, Statement, genesis_of
from protocol.identity import PeerId
from selector.consensus import inclusion
from selector.consensus.chain import Chain, InvalidStatement
from selector.consensus.clock import EpochClock
from selector.consensus.participant import Participant
from selector.consensus.sortition import MeasurementPlan, beacon_of, newcomers_in_order, select_committee
from selector.consensus.state import Contribution, State
from selector.voting import tally
from tests.support.concluded_once import conclude_once

CLOCK = EpochClock(600.0)
PLAN = MeasurementPlan(("long", "short"), tuple(f"method-{number}" for number in range(6)))
HARDWARE = "two cores"
GROUND = 16
"""Subsets of contributions, and beacons, that a hostile proposer tries."""


def truth(cell: Cell) -> float:
    return -0.5 - int(cell.method[-1]) / 10


def lie(cell: Cell) -> float:
    return 1.0 if cell.method.endswith(("0", "1")) else truth(cell)


@pytest.fixture(autouse=True)
def _concluded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    conclude_once(monkeypatch)


@dataclass
class Attack:
    """What hostile members do. By default they lie in the cells that decide, and otherwise do what they should."""

    reads: Callable[[Cell], float] = lie
    hardware: Callable[[int], str] = lambda epoch: HARDWARE
    """The class that they state in an epoch, also where they should state none."""
    takes_part: Callable[[int], bool] = lambda epoch: True
    signs: Callable[[int], bool] = lambda epoch: True
    withholds: Callable[[int, int], bool] = lambda epoch, number: False
    """Whether the member of this number withholds its reveal in an epoch."""
    lists: bool = True
    """Whether they list the honest, too."""
    censors: bool = False
    """Whether their proposers leave out honest contributions, and grind for a favourable beacon."""
    pads: Callable[[int], bool] = lambda epoch: False
    """Whether in an epoch they commit in time for its proposers alone, and list only themselves, by many reveals."""
    recruits: int = 0
    """Newcomers that they bring in every epoch, with ids ground for the beacon that is known by then."""


@dataclass
class World:
    """One swarm under attack."""

    count: int
    hostile_count: int
    seed: int
    attack: Attack
    epoch: int = 0
    censored: int = 0
    """Hostile proposals that left out honest contributions."""
    known: set[str] = field(default_factory=set)
    """All that were ever members or candidates."""
    former: set[str] = field(default_factory=set)
    """Of these, honest ones that were ever removed."""

    def __post_init__(self) -> None:
        self.rng = Random(self.seed)
        self.genesis = genesis_of(b"swarm", f"model {self.seed}", "rules")
        names = [self._new_name() for _ in range(self.count)]
        self.evil = {*self.rng.sample(names, self.hostile_count)}
        self.peers = {name: self._participant(name) for name in names}
        self.founding = {*names}
        self.honest = [name for name in names if name not in self.evil]

    def _new_name(self) -> PeerId:
        return PeerId(f"peer-{self.rng.getrandbits(64):016x}")

    def join(self) -> PeerId:
        """Add an honest newcomer."""
        name = self._new_name()
        self._follow(name)
        return name

    def _follow(self, name: PeerId) -> None:
        """Add a newcomer that has verified the chain."""
        self.peers[name] = newcomer = self._participant(name)
        for entry in self.judge.chain.canonical():
            assert entry.statement is not None
            newcomer.chain.add(entry.statement)
            for signer in entry.signers:
                newcomer.chain.add_signature(Signature(self.genesis, entry.epoch, signer, entry.id))
        newcomer.adopt_state(self.state)

    def _participant(self, name: PeerId) -> Participant:
        return Participant(name, Chain(self.genesis), CLOCK, PLAN)

    @property
    def judge(self) -> Participant:
        return self.peers[self.honest[0]]

    @property
    def state(self) -> State:
        state = self.judge.state()
        assert state is not None
        return state

    @property
    def members(self) -> set[PeerId]:
        return {*self.judge.chain.head.members}

    def play(self, epochs: int) -> None:
        for _ in range(epochs):
            self._recruit()
            contributions = self._commit()
            self._reveal(contributions)
            for turn in range(CLOCK.turns()):
                if self._agree(turn):
                    break
            for peer in self.peers.values():
                if not peer.derive_state():
                    peer.adopt_state(self.state)
                peer.prune(CLOCK.starts_s(self.epoch + 1))
            if self.judge.chain.head.epoch == self.epoch and self.epoch > 0:
                known = {*self.state.hardware}
                self.former |= (self.known & {*self.honest}) - known
                self.known |= known
            self.epoch += 1

    def _recruit(self) -> None:
        """Bring newcomers whose ids come first by what is known of the beacon; those that were not taken go."""
        for name in {*self.peers} - self.founding - self.state.hardware.keys():
            if name in self.evil:
                del self.peers[name]
                self.evil.remove(name)
        beacon = beacon_of(self.state.beacon, self.epoch)
        made = [self._new_name() for _ in range(8 * self.attack.recruits)]
        for name in newcomers_in_order(beacon, made)[: self.attack.recruits]:
            self._follow(name)
            self.evil.add(name)

    def _commit(self) -> list[Contribution]:
        now_s = CLOCK.starts_s(self.epoch) + 1
        contributions = []
        for name, peer in self.peers.items():
            is_evil = name in self.evil
            if not peer.is_selected(now_s) or (is_evil and not self.attack.takes_part(self.epoch)):
                continue
            reads = self.attack.reads if is_evil else truth
            readings = [
                Reading(cell, round(reads(cell) * VALUE_SCALE) + self.rng.randrange(-20_000, 20_000))
                for cell in peer.assigned(now_s)
            ]
            hardware = self.attack.hardware(self.epoch) if is_evil else HARDWARE
            commit, reveal = peer.contribute(now_s, hardware, readings, [], self.rng.randbytes(32))
            stated = hardware if hardware != HARDWARE else commit.hardware
            contributions.append(Contribution(replace(commit, hardware=stated), reveal))
        for name, peer in self.peers.items():
            for commit, _ in contributions:
                is_late = commit.peer in self.evil and self.attack.pads(self.epoch)
                peer.on_commit(commit, self._late_s(name) if is_late else now_s)
                peer.confirm(commit)
        return contributions

    def _late_s(self, receiver: PeerId) -> float:
        """Return when a commit that is sent to the proposers after the lists reaches a peer."""
        proposers = select_committee(beacon_of(self.state.beacon, self.epoch), self.members)[: CLOCK.turns()]
        return (CLOCK.lists_end_s if receiver in proposers else CLOCK.reveals_begin_s)(self.epoch) + 1

    def _reveal(self, contributions: Iterable[Contribution]) -> None:
        now_s = CLOCK.reveals_begin_s(self.epoch) + 1
        sortition = self.state.draw(self.epoch, PLAN)
        self.revealed: list[Contribution] = []
        padding: list[Reveal] = []
        for number, (commit, draft) in enumerate(contributions):
            reveal = draft
            if commit.peer in self.evil:
                if self.attack.withholds(self.epoch, number):
                    continue
                if commit.peer in sortition.committee:
                    listed = sortition.expected if self.attack.lists else [*self.evil]
                    reveal = replace(draft, inclusion=inclusion.pack(listed, sortition.expected))
                if self.attack.pads(self.epoch):
                    reveal = replace(draft, inclusion=inclusion.pack({commit.peer}, sortition.expected))
                    padding += [replace(reveal, nonce=self.rng.randbytes(32)) for _ in range(3)]
            else:
                reveal = self.peers[commit.peer].reveal(draft, now_s)
            self.revealed.append(Contribution(commit, reveal))
        for peer in self.peers.values():
            for reveal in (*(each.reveal for each in self.revealed), *padding):
                peer.on_reveal(reveal, now_s)

    def _agree(self, turn: int) -> bool:
        """Take one proposer's turn; return whether its statement has a quorum."""
        now_s = CLOCK.proposes_s(self.epoch, turn) + 1
        for name in [*self.peers]:
            statement = self._proposal(name, now_s)
            if statement is None:
                continue
            for peer in self.peers.values():
                try:
                    peer.chain.add(statement)
                except InvalidStatement:
                    return False
            if name in self.evil:
                self._sign(Signature(self.genesis, self.epoch, name, statement.id))
        for _ in ("its proposer", "and then the others"):
            for name, peer in self.peers.items():
                if name not in self.evil and (signature := peer.vote(now_s)):
                    self._sign(signature)
        if self.attack.signs(self.epoch):
            for name in self.evil:
                for entry in self.judge.chain.candidates(self.epoch):
                    self._sign(Signature(self.genesis, self.epoch, name, entry.id))
        return self.judge.chain.head.epoch == self.epoch

    def _sign(self, signature: Signature) -> None:
        for peer in self.peers.values():
            peer.chain.add_signature(signature)

    def _proposal(self, name: PeerId, now_s: float) -> Statement | None:
        peer = self.peers[name]
        if name not in self.evil or not self.attack.censors or not self.members:
            return peer.propose(now_s) if name not in self.evil or self.attack.signs(self.epoch) else None
        honest = peer.propose(now_s)  # None, where it is not its turn
        state = peer.state()
        if honest is None or state is None:
            return None
        self.censored += 1
        return self._censored(peer, state, honest)

    def _censored(self, peer: Participant, state: State, honest: Statement) -> Statement:
        """Return a statement that leaves out honest contributions, such that a hostile member proposes next."""
        own = [each for each in self.revealed if each.commit.peer in self.evil]
        others = [each for each in self.revealed if each.commit.peer not in self.evil]
        for _ in range(GROUND):
            chosen = [*own, *self.rng.sample(others, self.rng.randrange(len(others)))]
            found = peer._conclude(peer.chain.head, state, self.epoch, peer.peer, chosen, ()).statement
            members = [member for member in self.members if member not in {*found.left}]
            if select_committee(beacon_of(found.beacon, self.epoch + 1), members)[0] in self.evil:
                return found
        return honest

    @cached_property
    def lied(self) -> list[Cell]:
        """The firm cells with the value of the hostile."""
        return [cell for cell, agreed in self.state.table.items() if agreed.firm and agreed.value > 0]

    def assert_not_captured(self, *, honest_share: float = 2 / 3) -> None:
        assert len({self.peers[name].chain.head.id for name in self.honest}) == 1
        assert not self.former, "honest members that took part were removed"
        members = self.members
        assert {*self.honest} <= members
        assert len(members & self.evil) <= len(members) * (1 - honest_share)
        self.assert_table_holds()

    def assert_table_holds(self) -> None:
        # Of a cell's seven readers four may be hostile by chance, until it is measured again.
        assert len(self.lied) <= self.count // 50


def third(count: int) -> int:
    """Return the most members that are fewer than a third."""
    return (count - 1) // 3


def soaked(*cases: tuple[int, int]) -> list[Any]:
    return [pytest.param(*case, marks=pytest.mark.soak) for case in cases]


CENSORED = [(10, 0), (13, 1), (20, 2)]
CENSORED_SOAK = soaked((10, 3), (10, 4), (13, 5), (16, 6), (16, 7), (20, 8), (31, 9), (50, 10), (100, 11))


@pytest.mark.parametrize(("count", "seed"), [*CENSORED, *CENSORED_SOAK])
def test_proposers_that_censor_and_grind_capture_nothing(count: int, seed: int) -> None:
    world = World(count, third(count), seed, Attack(censors=True, lists=False))
    world.play(10 if count <= MAX_JOINED else 20)  # more than that found no chain, and have to join it
    assert world.censored
    world.assert_not_captured()


def test_member_that_pads_the_lists_voids_no_epoch() -> None:
    world = World(10, 1, 0, Attack(reads=truth, pads=lambda epoch: epoch % 3 > 0))
    world.play(9)
    assert [entry.epoch for entry in world.judge.chain.canonical()] == [*range(9)]
    world.assert_not_captured()


@pytest.mark.parametrize(("count", "seed"), [(10, 0), *soaked((31, 1), (64, 2))])
def test_members_that_withhold_their_reveals_lose_weight_and_capture_nothing(count: int, seed: int) -> None:
    world = World(count, third(count), seed, Attack(reads=truth, withholds=lambda epoch, number: epoch % 3 > 0))
    world.play(9)
    weights = world.state.weights
    withheld = [weights[name] for name in world.evil if name in weights]
    assert max(withheld, default=0) < min(weights[name] for name in world.honest)
    world.assert_not_captured()


@pytest.mark.parametrize(("count", "seed"), [(10, 0), *soaked((31, 1), (61, 2))])
def test_silence_of_fewer_than_a_third_neither_stops_the_chain_nor_removes_others(count: int, seed: int) -> None:
    def present(epoch: int) -> bool:
        return not 2 <= epoch < 14

    world = World(count, third(count), seed, Attack(reads=truth, takes_part=present, signs=present))
    world.play(14)
    assert world.judge.chain.head.epoch == 13
    assert not world.members & world.evil
    world.play(4)
    world.assert_not_captured()


@pytest.mark.parametrize(("count", "seed"), [(12, 0), *soaked((30, 1), (63, 2))])
def test_who_stops_the_chain_cannot_refound_it_with_strangers(count: int, seed: int) -> None:
    def present(epoch: int) -> bool:
        return not 2 <= epoch < 14

    attack = Attack(takes_part=present, signs=present)
    world = World(count, count // 3, seed, attack)
    world.play(13)
    assert world.judge.chain.head.epoch == 1
    former = world.members
    attack.recruits = 40
    world.play(2)
    assert world.judge.chain.head.epoch == 14
    assert {*world.honest} <= world.members <= former
    attack.recruits = 0
    world.play(3)
    assert world.judge.chain.head.epoch == world.epoch - 1
    world.assert_table_holds()


@pytest.mark.parametrize(("count", "seed"), [(10, 0), *soaked((31, 1))])
def test_hardware_class_is_stated_once(count: int, seed: int) -> None:
    world = World(count, third(count), seed, Attack(hardware=lambda epoch: f"class {epoch}" if epoch else HARDWARE))
    world.play(10)
    assert {*world.state.hardware.values()} == {HARDWARE}
    assert {cell.hardware for cell in world.state.measured} == {HARDWARE}
    world.assert_not_captured()


def test_classes_made_up_by_a_third_leave_most_measurements_to_the_others() -> None:
    world = World(10, 3, 0, Attack(hardware=lambda epoch: f"class {world.rng.random()}"))
    world.play(8)
    honest = [cell for cell in PLAN.cells([HARDWARE]) if cell in world.state.measured]
    assert len(honest) == len(PLAN.cells([HARDWARE]))
    world.assert_not_captured()


@pytest.mark.parametrize(("count", "seed"), [(10, 0), *soaked((31, 1), (50, 2))])
def test_newcomers_with_ground_ids_do_not_keep_others_out(count: int, seed: int) -> None:
    world = World(count, third(count), seed, Attack(reads=lambda cell: 1.0))
    world.play(2)
    expected = [world.join() for _ in range(4)]
    world.attack.recruits = 36
    world.play(5)
    assert len({*expected} & world.members) >= 3
    world.assert_not_captured()


def test_votes_against_own_readings_do_not_choose_the_method() -> None:
    world = World(10, 3, 0, Attack(reads=truth))
    world.play(8)
    state = world.state
    cheats, honest = [*world.evil & world.members][:2], world.honest[0]
    best, worst = f"method-{len(PLAN.methods) - 1}", "method-0"
    told = {name: truth(Cell(HARDWARE, "long", name)) for name in PLAN.methods}
    swapped = {**told, best: 1.0, worst: -2.0}
    votes = [(cheats[0], swapped), (cheats[1], swapped), (honest, told)]
    ballots = [[vote[name] for name in PLAN.methods] for _, vote in votes]
    agreement = Agreement(
        *(state.epoch, b"", state.table_digest, state.weights, state.table), state.hardware, state.readings
    )
    weights = agreement.weigh(PLAN.methods, votes)
    assert min(state.weights[peer] for peer in cheats) > 0
    assert weights == (0, 0, state.weights[honest])
    assert tally(PLAN.methods, ballots, [state.weights[peer] for peer, _ in votes]) == worst
    assert tally(PLAN.methods, ballots, weights) == best
