"""This node's part in the consensus of every model that it follows: one chain node each, gossip, and anti-entropy.

Gossip is fast and lossy; every peer also fetches what it missed from a random neighbour several times an epoch. The
cost of what a peer sends is charged to its own rate limits, and a violation bans it for a while.
"""

import hashlib
import math
import random
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Final

import structlog
import trio

from node.consensus.chain_node import ChainNode
from node.consensus.chain_sync import ChainInitiator, ChainResponder
from node.consensus.environment import ConsensusEnvironment, ConsensusRules
from node.consensus.followed_chains import FollowedChains
from node.consensus.forwarding import Forwarder
from node.network.interface import Network
from node.replication.gossip_topic import GossipTopic, Verifier
from node.replication.peer_limits import Ban, PeerAllowances, PeerLimits
from node.replication.pull import PullLimits, PullService
from node.storage.database import StorageError
from node.util.token_bucket import Allowance
from protocol.chains import PROTOCOL_ID
from protocol.consensus import CONSENSUS_TOPIC, SignedMessage
from protocol.consensus_values import EquivocationProof
from protocol.forms import Digest
from protocol.identity import ModelId, PeerId
from selector.consensus.clock import EpochClock

MAX_CHAINS: Final = 8
"""Chains that a node follows at a time: of models that it serves, then of those that its jobs use, then of others."""

USED_S: Final = 3600.0
"""How long after its last job a model counts as used."""

MODELS_ROUND_S: Final = 1.0
"""Interval at which chains of new models are started."""

RETENTION_INTERVAL_S: Final = 3600.0
"""Interval at which chains that are not followed any more are looked for on disk."""

VERIFIED_RECORDS: Final = 4096
"""Records remembered as verified, so that a duplicate is not verified again."""

FORWARDING_PAUSE: Final = 0.01
"""Mean pause before fetched messages are gossiped onward, as a fraction of an epoch."""

SHORTEST_PULL_INTERVAL_S: Final = 0.5

PEER_ALLOWANCES: Final = PeerAllowances(
    gossip=Allowance(4, 64),  # a peer publishes about five records an epoch
    work=Allowance(100, 1000),
    traffic=Allowance(1 << 20, 8 << 20),
    sessions=Allowance(4, 16),
)
GOSSIP_WORK: Final = Allowance(1000, 8000)
PULL_LIMITS: Final = PullLimits(traffic=Allowance(4 << 20, 16 << 20))

_logger = structlog.get_logger(__name__)


def swarm_name(swarm_key: str | None) -> bytes:
    """Return the name of a swarm in its chains: the hash of its key, which outsiders lack, or of the empty string."""
    return hashlib.sha256(b"metaswarm/swarm/" + (swarm_key or "").encode()).digest()


class ConsensusService:
    """This node's part in the consensus. Made before the network runs; `run` needs it running."""

    def __init__(
        self,
        network: Network,
        chains: FollowedChains,
        environment: ConsensusEnvironment,
        clock: EpochClock,
        rules: Callable[[ModelId], ConsensusRules],
        jitter: random.Random,
    ) -> None:
        """Join the topic and serve the protocol. `chains`: where the chains that are followed are added.

        `clock`: of all chains. `rules`: returns those of a model, which change once its package format is known.
        """
        self._environment = environment
        self._clock = clock
        self._rules = rules
        self._running: dict[ModelId, trio.CancelScope] = {}
        self._jitter = jitter
        self._chains = chains.nodes
        self._used_s = chains.used_s
        self._by_genesis: dict[Digest, ChainNode] = {}
        self._peer_limits = PeerLimits(PEER_ALLOWANCES)
        self._verifier = Verifier(environment.verify, VERIFIED_RECORDS, lambda envelope: 1.0)
        self._gossip = GossipTopic(
            network, CONSENSUS_TOPIC, self._verifier, self._peer_limits, GOSSIP_WORK, accepts=self._accepts
        )
        self._forwarder = Forwarder(self._forward, clock.epoch_s * FORWARDING_PAUSE, jitter)
        self._pull = PullService(
            network,
            PROTOCOL_ID,
            self._peer_limits,
            PULL_LIMITS,
            jitter,
            respond=partial(ChainResponder, chains=self._by_genesis.get),
        )

    def bans(self) -> dict[PeerId, Ban]:
        """Return the peers that are banned now."""
        return self._peer_limits.bans(trio.current_time())

    async def run(self) -> None:
        """Take part until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._gossip.run, self._on_gossip)
            nursery.start_soon(self._forwarder.run)
            nursery.start_soon(self._retention_loop)
            nursery.start_soon(self._pull.watch_connections, self._on_connected)
            while True:
                self._follow_new_models(nursery)
                await trio.sleep(min(MODELS_ROUND_S, self._clock.epoch_s / 20))

    async def _retention_loop(self) -> None:
        """Delete the stored chains that are not followed any more."""
        environment = self._environment
        while True:
            await trio.sleep(RETENTION_INTERVAL_S)
            now_s, by_age = environment.wall_clock(), environment.clock_agrees() is True
            try:
                if deleted := await environment.store.retain([*self._by_genesis], now_s, by_age=by_age):
                    _logger.info("chains deleted that are not followed", chains=deleted)
            except StorageError as error:
                _logger.warning("could not delete chains that are not followed", reason=str(error))

    def _follow_new_models(self, nursery: trio.Nursery) -> None:
        models = self._environment.models()
        followed = self._followed(models)
        for model in followed:
            rules = self._rules(model)
            genesis = rules.genesis(model)
            if (former := self._chains.get(model)) is not None:
                if former.genesis == genesis:
                    continue
                self._stop(model)
            elif len(self._chains) >= MAX_CHAINS:
                self._stop(min({*self._chains} - {*followed}, key=lambda each: (each in models, each)))
            chain = ChainNode(
                self._environment,
                rules,
                genesis,
                self._environment.meter(model),
                participates=partial(self._participates, model),
                publish=self._publish,
            )
            self._chains[model] = self._by_genesis[genesis] = chain
            self._running[model] = scope = trio.CancelScope()
            nursery.start_soon(self._run_chain, chain, scope)

    def _followed(self, models: Mapping[ModelId, bool]) -> list[ModelId]:
        """Return the models whose chains are followed; of equal ones those that are followed already."""
        used_after_s = trio.current_time() - USED_S

        def rank(model: ModelId) -> tuple[bool, bool, bool, ModelId]:
            is_used = self._used_s.get(model, -math.inf) >= used_after_s
            return not models[model], not is_used, model not in self._chains, model

        return sorted(models, key=rank)[:MAX_CHAINS]

    def _stop(self, model: ModelId) -> None:
        """Follow a chain no longer. What is stored of it stays for a while, to go on from if it is needed again."""
        self._running.pop(model).cancel()
        del self._by_genesis[self._chains.pop(model).genesis]

    def _participates(self, model: ModelId) -> bool:
        """Return whether we serve a model, and our clock is not known to be wrong: else what we sign is of no use."""
        environment = self._environment
        return environment.models().get(model, False) and environment.clock_agrees() is not False

    async def _run_chain(self, chain: ChainNode, scope: trio.CancelScope) -> None:
        with scope:
            while True:
                try:
                    await chain.load()
                    break
                except StorageError as error:
                    _logger.warning("chain could not be loaded, retrying", reason=str(error))
                    await trio.sleep(self._clock.epoch_s / 10)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._pull_loop, chain)
                await chain.run()

    # Gossip

    def _publish(self, records: Sequence[SignedMessage]) -> None:
        self._gossip.publish(record.envelope for record in records)

    def _accepts(self, source: PeerId, record: SignedMessage) -> bool:
        """Return whether a record is forwarded, whoever signed it: of a chain that is followed, and of now."""
        del source
        epoch = self._clock.epoch_at(self._environment.wall_clock())
        is_timely = isinstance(record.body, EquivocationProof) or abs(record.epoch - epoch) <= 1
        return is_timely and record.body.chain in self._by_genesis

    async def _forward(self, records: Sequence[SignedMessage]) -> None:
        await self._gossip.publish_batch([record.envelope for record in records])

    async def _on_gossip(self, records: Sequence[SignedMessage]) -> None:
        self._forwarder.on_gossip(records)
        for record in records:
            if chain := self._by_genesis.get(record.body.chain):
                chain.receive([record])

    # Anti-entropy

    async def _pull_loop(self, chain: ChainNode) -> None:
        """Fetch what is missing from a neighbour several times an epoch, and at once when something is known to be."""
        interval_s = self._clock.epoch_s / 20
        forward = partial(self._forwarder.on_fetched, chain)
        initiate = partial(ChainInitiator, chain=chain, verify=self._verifier.verify, forward=forward)
        while True:
            peer = self._pull.choose_neighbour()
            if peer and (await self._pull.pull(peer, initiate)).more:
                continue
            if peer or not self._pull.pulling:  # else every neighbour is busy with our other chains: retry soon
                with trio.move_on_after(self._jitter.uniform(0.8, 1.2) * interval_s):
                    await chain.needs_sync.wait()
            await trio.sleep(min(SHORTEST_PULL_INTERVAL_S, interval_s / 4) * self._jitter.uniform(0.5, 1))

    async def _on_connected(self, peer: PeerId) -> None:
        del peer
        for chain in self._chains.values():
            chain.needs_sync.set()
