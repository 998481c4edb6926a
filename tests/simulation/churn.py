"""Jobs under churn: peers join, leave and die all the time, and whoever was promised a text gets it, and the right one.

Planner, routes, links, stages and replays are the real ones. The engine is a hash chain, so that a row lost, doubled or
given to the wrong session shows in the text. Who knows of whom, and how late, is modelled: heartbeats of fifty peers
would take most of the time of the run, and have simulations of their own.
"""

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import cast

import trio

from node.coordinator.submission import JobError, JobErrorCode, JobRequest
from node.identity import Identity
from node.network.addresses import AddressBook
from node.network.interface import Network
from node.stages.block_placement import PlacementAnnouncements
from node.stages.stage_server import StageServer
from node.swarm.directory import Candidate
from node.swarm.membership import Membership
from node.testing.fake_engine import expected_tokens, fake_span_info
from node.testing.memory_links import LinkModel
from protocol.identity import BlockRange, ModelId, PeerId, Stage
from selector.cuts import Cuts
from selector.routing import Link, Links
from tests.simulation import virtual_time
from tests.support.job_peers import BLOCKS, VOCABULARY, Peer, Swarm

SPANS = ((0, 3), (3, 6), (6, 9), (0, 6), (3, 9))
COORDINATORS = 2
DRAIN_LIMIT_S = 30.0

HEARD_AFTER_S = 0.3
"""From the moment that a peer serves, or says goodbye, until the others know."""

HEARTBEAT_S = 2.5
MISSED_AFTER_S = 10.0
"""From the death of a peer until the others have missed enough of its heartbeats."""


@dataclass(frozen=True, kw_only=True)
class Churn:
    """What befalls the swarm. `step_s`: so long a stage takes for a token, which makes jobs long and the run short."""

    seed: int
    peers: int = 50
    duration_s: float = 3600.0
    joins_per_s: float = 1.0
    leaves_per_s: float = 1.0
    jobs_at_once: int = 4
    max_tokens: int = 16
    step_s: float = 0.4


@dataclass
class Outcome:
    """What became of the jobs. `faults`: one line for each that did not end as it should."""

    right: int = 0
    replays: int = 0
    left: int = 0
    """Peers that left, the half of them by dying."""
    uncovered: int = 0
    """Jobs that were refused in so many words while some block was served by nobody."""
    faults: list[str] = field(default_factory=list)
    longest_s: float = 0.0


def play(churn: Churn) -> Outcome:
    """Return what becomes of the jobs; the same every time."""

    async def program() -> Outcome:
        link = LinkModel(latency_s=0.01, jitter_s=0.02, resolution_s=0.005)
        async with trio.open_nursery() as nursery:
            outcome = await _Play(churn, RumourSwarm(nursery, churn.seed, link)).run()
            nursery.cancel_scope.cancel()
        return outcome

    return virtual_time.run(program, seed=churn.seed)


class Rumours:
    """Stands in for a peer's membership: it hears of what others serve, of goodbyes and of deaths a while later."""

    def __init__(self, network: Network, swarm: "RumourSwarm") -> None:
        self._network = network
        self._swarm = swarm
        self._forgotten_s: dict[PeerId, float] = {}

    async def run(self) -> None:
        await trio.sleep_forever()

    async def leave(self) -> None:
        await trio.sleep(0.1)

    def announce(self) -> None:
        self._swarm.heard_s[self._network.peer_id] = trio.current_time() + HEARD_AFTER_S

    def round_trip_s(self, peer: PeerId) -> float | None:
        return None

    def forget(self, peer: PeerId) -> None:
        """Take a peer for dead until its next heartbeat."""
        self._forgotten_s[peer] = trio.current_time() + HEARTBEAT_S

    async def candidates(
        self, model: ModelId, cuts: Cuts, links: Links, *, without: Iterable[PeerId]
    ) -> tuple[Candidate, ...]:
        await trio.lowlevel.checkpoint()
        return self.known_candidates(model, without=without)

    def unreached_stages(self, model: ModelId, blocks: Sequence[BlockRange]) -> tuple[Stage, ...]:
        return ()

    def known_candidates(self, model: ModelId, *, without: Iterable[PeerId]) -> tuple[Candidate, ...]:
        now_s = trio.current_time()
        found: list[Candidate] = []
        for peer in self._swarm.peers:
            is_known = self._swarm.heard_s.get(peer.id, now_s) < now_s < self._swarm.silent_s(peer)
            if peer.id in without or not is_known or self._forgotten_s.get(peer.id, 0.0) > now_s:
                continue
            found += [Candidate(Stage(peer.id, span.info.blocks), span.load()) for span in peer.stages.spans()]
        return tuple(found)


class RumourSwarm(Swarm):
    """A swarm in which word spreads without messages."""

    def __init__(self, nursery: trio.Nursery, seed: int, link: LinkModel) -> None:
        self.address_book = AddressBook()
        super().__init__(nursery, seed, link, address_book=self.address_book)
        self.heard_s: dict[PeerId, float] = {}
        self._gone_s: dict[PeerId, float] = {}

    def lives(self, peer: Peer) -> bool:
        """Whether a peer runs."""
        return self.hub.networks[peer.id].alive

    def silent_s(self, peer: Peer) -> float:
        """Return when the others no longer count on a peer."""
        return self._gone_s.get(peer.id, float("inf"))

    def die(self, peer: Peer) -> None:
        """Kill a peer, of which the others learn when they miss its heartbeats, or call it."""
        self._gone_s.setdefault(peer.id, trio.current_time() + MISSED_AFTER_S)
        self.hub.kill(peer.id)

    def goodbye(self, peer: Peer) -> None:
        """Have the others learn soon that a peer leaves."""
        self._gone_s[peer.id] = trio.current_time() + HEARD_AFTER_S

    def bury(self) -> None:
        """Forget whom nobody counts on any more."""
        now_s = trio.current_time()
        self.peers = [peer for peer in self.peers if self.lives(peer) or self.silent_s(peer) > now_s]

    def _membership(
        self, identity: Identity, network: Network, stages: StageServer, placements: PlacementAnnouncements
    ) -> Membership:
        return cast("Membership", Rumours(network, self))

    def _expected(self, membership: Membership, model: ModelId) -> tuple[BlockRange, ...]:
        return ()

    def _links(self, network: Network, membership: Membership) -> Links:
        near = Link(0.02, 1e8)
        return lambda a, b: near


class _Play:
    def __init__(self, churn: Churn, swarm: RumourSwarm) -> None:
        self._churn = churn
        self._swarm = swarm
        self._rng = random.Random(churn.seed)
        self._outcome = Outcome()
        self._info = fake_span_info(BlockRange(0, BLOCKS), block_count=BLOCKS)

    async def run(self) -> Outcome:
        churn, swarm = self._churn, self._swarm
        coordinators = [await swarm.join() for _ in range(COORDINATORS)]
        for number in range(churn.peers - COORDINATORS):
            await self._join(SPANS[number % len(SPANS)])
        await trio.sleep(5)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._join_again_and_again)
            nursery.start_soon(self._leave_again_and_again)
            ends_s = trio.current_time() + churn.duration_s
            async with trio.open_nursery() as jobs:
                for number in range(churn.jobs_at_once):
                    jobs.start_soon(self._submit_again_and_again, coordinators[number % COORDINATORS], ends_s)
            nursery.cancel_scope.cancel()
        return self._outcome

    def _serving(self) -> list[Peer]:
        """Return the peers that live, serve, and mean to stay."""
        self._swarm.bury()
        return [p for p in self._swarm.peers[COORDINATORS:] if self._swarm.lives(p) and not p.stages.is_draining]

    async def _join_again_and_again(self) -> None:
        while True:
            await trio.sleep(self._rng.expovariate(self._churn.joins_per_s))
            await self._join(self._rng.choice(SPANS))

    async def _join(self, span: tuple[int, int]) -> None:
        peer = await self._swarm.join(span, step_s=self._churn.step_s)
        self._swarm.address_book.add(peer.id, peer.network.multiaddrs)

    async def _leave_again_and_again(self) -> None:
        async with trio.open_nursery() as nursery:
            while True:
                await trio.sleep(self._rng.expovariate(self._churn.leaves_per_s))
                serving = self._serving()
                if not serving:
                    continue
                peer = self._rng.choice(serving)
                self._outcome.left += 1
                if self._rng.random() < 0.5:
                    self._swarm.die(peer)
                else:
                    nursery.start_soon(self._leave, peer)

    async def _leave(self, peer: Peer) -> None:
        """Leave as a daemon does that is asked to."""
        peer.stages.start_draining()
        self._swarm.goodbye(peer)
        await peer.membership.leave()
        peer.stages.migrate_sessions()
        with trio.move_on_after(DRAIN_LIMIT_S):
            await peer.stages.wait_idle()
        self._swarm.die(peer)

    async def _submit_again_and_again(self, coordinator: Peer, ends_s: float) -> None:
        while trio.current_time() < ends_s:
            await self._submit(coordinator)
            await trio.sleep(self._rng.uniform(0, 1))

    async def _submit(self, coordinator: Peer) -> None:
        prompt = [self._rng.randrange(VOCABULARY) for _ in range(self._rng.randint(1, 12))]
        count = self._rng.randint(1, self._churn.max_tokens)
        request = JobRequest(model="fake", prompt=" ".join(map(str, prompt)), max_tokens=count)
        outcome, began_s = self._outcome, trio.current_time()
        was_covered = self._is_covered()
        try:
            result = await coordinator.run(request)
        except JobError as error:
            if error.code is JobErrorCode.UNCOVERED and not (was_covered and self._is_covered()):
                outcome.uncovered += 1
            else:
                outcome.faults.append(f"at {began_s:.1f} s: {error.code}: {error}")
            return
        finally:
            outcome.longest_s = max(outcome.longest_s, trio.current_time() - began_s)
        outcome.replays += result.replays
        if result.token_ids == expected_tokens(self._info, prompt, count):
            outcome.right += 1
        else:
            outcome.faults.append(f"at {began_s:.1f} s: another text than undisturbed")

    def _is_covered(self) -> bool:
        """Whether a route exists that there was time to hear of."""
        reached, now_s = {0}, trio.current_time()
        heard = [peer for peer in self._serving() if self._swarm.heard_s.get(peer.id, now_s) < now_s]
        spans = sorted(span.info.blocks for peer in heard for span in peer.stages.spans())
        for blocks in spans:
            if blocks.start in reached:
                reached.add(blocks.end)
        return BLOCKS in reached
