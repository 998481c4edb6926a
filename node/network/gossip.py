"""GossipSub: the library's, with a guard around every message and limits that say what they drop."""

import logging
import random
from collections import defaultdict
from collections.abc import AsyncIterator, Collection, Iterable
from contextlib import asynccontextmanager
from typing import Final

import trio
from libp2p.abc import INetStream
from libp2p.custom_types import TProtocol
from libp2p.network.stream.net_stream import NetStream
from libp2p.peer.id import ID
from libp2p.pubsub.gossipsub import GossipSub
from libp2p.pubsub.pb import rpc_pb2
from libp2p.pubsub.pubsub import Pubsub
from libp2p.tools.timed_cache.last_seen_cache import LastSeenCache

from node.network.addresses import address_range
from node.network.broadcast import Broadcast
from node.network.interface import GossipMessage, GossipValidator, NetworkError
from node.network.scores import Scores
from node.network.swarm import GuardedHost, start_service
from node.network.yamux import Yamux
from protocol.errors import RemoteProtocolError, UntimelyError
from protocol.identity import PeerId, parse_peer_id

logger = logging.getLogger(__name__)

PROTOCOLS: Final = (TProtocol("/meshsub/1.2.0"), TProtocol("/meshsub/1.1.0"))
MAX_MESSAGE_BYTES: Final = 64 << 10
READER_CAPACITY: Final = 1024
MAX_RATE_HZ: Final = 200.0
"""Messages a second that one peer may hand to us, its own and those it forwards; twice as many in a burst."""

OUTBOUND_CAPACITY: Final = 512
WARNING_BYTES: Final = 4096
"""From this size on a message is announced to the mesh before it is sent, so that it does not come twice."""
CUT_OFF_DEBT: Final = 2000
"""A peer that sends so many messages beyond what it may send is disconnected."""
SEEN_LIFETIME_S: Final = 120.0
MAX_SEEN: Final = 65536
MAX_SEQUENCE_BYTES: Final = 64
MAX_MESH_PEERS_PER_RANGE: Final = 3
"""Of the 6 to 12 in a mesh, so many may have their addresses within one public /24 or /56."""


class _Bucket:
    """How many messages a peer may hand to us now; below zero it is in debt for those that were dropped."""

    def __init__(self) -> None:
        self.tokens = 2 * MAX_RATE_HZ
        self.filled_at = trio.current_time()

    def take(self) -> float:
        """Take a token; return how many were left."""
        now = trio.current_time()
        left = min(2 * MAX_RATE_HZ, self.tokens + (now - self.filled_at) * MAX_RATE_HZ)
        self.tokens = left - 1
        self.filled_at = now
        return left


class _SeenMessages(LastSeenCache):
    """The ids of messages that were seen lately. The library's cache starts a thread and knows no bound."""

    def __init__(self) -> None:
        self._expiry: dict[bytes, float] = {}

    def add(self, key: bytes) -> bool:
        """Note an id; return whether it is new."""
        new = not self.has(key)
        self._expiry[key] = trio.current_time() + SEEN_LIFETIME_S
        while len(self._expiry) > MAX_SEEN or self._expiry[next(iter(self._expiry))] < trio.current_time():
            del self._expiry[next(iter(self._expiry))]
        return new

    def has(self, key: bytes) -> bool:
        """Whether an id was seen lately; if so it is kept longer."""
        expiry = self._expiry.pop(key, None)
        if expiry is None or expiry < trio.current_time():
            return False
        self._expiry[key] = trio.current_time() + SEEN_LIFETIME_S
        return True


class _GuardedPubsub(Pubsub):
    """Pubsub that looks at a message before it pays for a signature check, and that survives a reconnection.

    The library forgets what a peer subscribed to when its own stream to that peer breaks, although the peer, whose
    stream to us is whole, will not say it again; and it keeps a dead stream when the peer has another connection.
    """

    def __init__(self, host: GuardedHost, router: "Router", gossip: "Gossip") -> None:
        super().__init__(host, router, strict_signing=True, allowed_topics=set(gossip.topics))
        self.seen_messages.stop()
        self.seen_messages = _SeenMessages()
        self._gossip = gossip
        self._buckets: dict[ID, _Bucket] = {}
        self._inbound: dict[ID, int] = {}
        self._unverified: set[int] = set()

    async def stream_handler(self, stream: INetStream) -> None:
        """Read what a peer says, for as long as its stream lasts."""
        peer = stream.muxed_conn.peer_id
        self._inbound[peer] = self._inbound.get(peer, 0) + 1
        try:
            await super().stream_handler(stream)
        finally:
            self._inbound[peer] -= 1
            if not self._inbound[peer]:
                del self._inbound[peer]
                self._forget_all_subscriptions(peer)

    def _forget_all_subscriptions(self, peer_id: ID) -> None:
        if peer_id not in self._inbound:
            super()._forget_all_subscriptions(peer_id)

    async def _handle_new_peer(self, peer_id: ID) -> None:
        # Opening a stream would dial a peer that has just gone, or that we have just sent away.
        if self._peer_is_connected(peer_id):
            await super()._handle_new_peer(peer_id)

    async def handle_dead_peer_queue(self) -> None:
        """Take note of lost connections; a peer that has another one gets a new stream."""
        async with self.dead_peer_receive_channel:
            self.event_handle_dead_peer_queue_started.set()
            async for peer_id in self.dead_peer_receive_channel:
                stream = self.peers.get(peer_id)
                dead = isinstance(stream, NetStream) and stream.is_closed
                if dead or not self._peer_is_connected(peer_id):
                    self._handle_dead_peer(peer_id)

    async def push_msg(self, msg_forwarder: ID, msg: rpc_pb2.Message) -> None:
        """Take a message in, from a peer or from ourselves."""
        if msg_forwarder == self.my_id:
            await super().push_msg(msg_forwarder, msg)
            return
        if not self._acceptable(msg_forwarder, msg) or self._is_msg_seen(msg):
            return
        self._unverified.add(id(msg))
        try:
            await super().push_msg(msg_forwarder, msg)
            if id(msg) in self._unverified:  # it never came to its validator: the signature is wrong
                self._gossip.scores.invalid(msg_forwarder, msg.topicIDs[0])
        finally:
            self._unverified.discard(id(msg))

    async def validate_msg(self, msg_forwarder: ID, msg: rpc_pb2.Message) -> None:
        """Ask the topic's validator, once the signature is verified."""
        self._unverified.discard(id(msg))
        await super().validate_msg(msg_forwarder, msg)

    def _acceptable(self, forwarder: ID, message: rpc_pb2.Message) -> bool:
        if not self._gossip.scores.allow_publish(forwarder, []):
            return False
        bucket = self._buckets.get(forwarder)
        if bucket is None:
            self._buckets = {peer: kept for peer, kept in self._buckets.items() if peer in self.peers}
            bucket = self._buckets[forwarder] = _Bucket()
        left = bucket.take()
        if left < 1:
            self._gossip.dropped += 1
            if left < -CUT_OFF_DEBT:
                self._cut_off(forwarder)
            return False
        return (
            len(message.topicIDs) == 1
            and message.topicIDs[0] in self._gossip.topics
            and len(message.data) <= MAX_MESSAGE_BYTES
            and len(message.seqno) <= MAX_SEQUENCE_BYTES
        )

    def _cut_off(self, forwarder: ID) -> None:
        for connection in self.host.get_network().get_connections(forwarder):
            if isinstance(connection.muxed_conn, Yamux):
                connection.muxed_conn.abort("it floods us with gossip")

    def notify_subscriptions(self, publish_message: rpc_pb2.Message) -> None:
        """Hand a message that passed the validator to our readers."""
        if publish_message.from_id != self.my_id.to_bytes():
            source = PeerId(ID(publish_message.from_id).to_base58())
            self._gossip.readers[publish_message.topicIDs[0]].put(GossipMessage(source, publish_message.data))


class Router(GossipSub):
    """GossipSub that keeps a burst, says little, and forgets what only its adaptive mode, which is off, would.

    Its meshes have no place for a peer with a bad score, and few for peers within one public range of addresses.
    """

    _worth_a_warning = False

    def __init__(self, scores: Scores) -> None:
        super().__init__(
            protocols=PROTOCOLS,
            # Fewer than the usual 6: every copy costs CPU, and what does not arrive comes with the next heartbeat or by
            # anti-entropy.
            degree=4,
            degree_low=3,
            degree_high=8,
            heartbeat_interval=1,
            # What follows is switched off: a silent cap of ten messages a second, and heuristics that change the mesh.
            spam_protection_enabled=False,
            adaptive_gossip_enabled=False,
            eclipse_protection_enabled=False,
        )
        self.scorer: Scores = scores

    def add_peer(self, peer_id: ID, protocol_id: TProtocol | None) -> None:
        """Note a new neighbour."""
        self.scorer.returned(peer_id)
        super().add_peer(peer_id, protocol_id)

    async def handle_rpc(self, rpc: rpc_pb2.RPC, sender_peer_id: ID) -> None:
        """Serve what a neighbour asks for."""
        if not self.scorer.graylisted(sender_peer_id):
            await super().handle_rpc(rpc, sender_peer_id)

    async def handle_graft(self, graft_msg: rpc_pb2.ControlGraft, sender_peer_id: ID) -> None:
        """Let a neighbour into a mesh, if there is a place for it."""
        mesh = self.mesh.get(graft_msg.topicID, set())
        if sender_peer_id in mesh or self._has_place(sender_peer_id, mesh):
            await super().handle_graft(graft_msg, sender_peer_id)
        else:
            await self.emit_prune(graft_msg.topicID, sender_peer_id, False, False)

    async def on_peer_subscribed(self, peer_id: ID, topic: str) -> None:
        """Let a neighbour that takes up a topic into its mesh, if there is a place for it."""
        if self._has_place(peer_id, self.mesh.get(topic, set())):
            await super().on_peer_subscribed(peer_id, topic)

    def mesh_heartbeat(self) -> tuple[defaultdict[ID, list[str]], defaultdict[ID, list[str]]]:
        """Keep every mesh at its size; who has a bad score goes."""
        expelled = [(peer, topic) for topic, mesh in self.mesh.items() for peer in mesh if self.scorer.of(peer) < 0]
        for peer, topic in expelled:
            self.mesh[topic].discard(peer)
            self._add_back_off(peer, topic, False)
        grafts, prunes = super().mesh_heartbeat()
        for peer, topic in expelled:
            prunes[peer].append(topic)
        return grafts, prunes

    def _get_in_topic_gossipsub_peers_from_minus(
        self,
        topic: str,
        num_to_select: int,
        minus: Iterable[ID],
        backoff_check: bool = False,
    ) -> list[ID]:
        """Choose peers for a mesh, or to tell them what we have: the library asks here for both."""
        minus = set(minus)
        candidates = super()._get_in_topic_gossipsub_peers_from_minus(topic, MAX_SEEN, minus, backoff_check)
        random.shuffle(candidates)
        chosen: list[ID] = []
        for peer in candidates:
            if len(chosen) < num_to_select and self._has_place(peer, minus.union(chosen)):
                chosen.append(peer)
        return chosen

    def _has_place(self, peer: ID, mesh: Collection[ID]) -> bool:
        if self.scorer.of(peer) < 0:
            return False
        here = self._range_of(peer)
        return here is None or sum(self._range_of(other) == here for other in mesh) < MAX_MESH_PEERS_PER_RANGE

    def _range_of(self, peer: ID) -> str | None:
        assert self.pubsub is not None
        for connection in self.pubsub.host.get_network().get_connections(peer):
            if isinstance(connection.muxed_conn, Yamux) and (host := connection.muxed_conn.host) is not None:
                return address_range(host)
        return None

    async def flush_pending_messages(self, peer_id: ID) -> None:
        """Send what waited for a new peer; this is called as soon as the peer has its outbound queue."""
        if self.pubsub is not None and (queue := self.pubsub.peer_queues.get(peer_id)) is not None:
            # A queue of 32 loses most of a burst, for good: those in the mesh are offered nothing a second time.
            queue._queue.max_size = OUTBOUND_CAPACITY  # noqa: SLF001
        await super().flush_pending_messages(peer_id)

    async def publish(self, msg_forwarder: ID, pubsub_msg: rpc_pb2.Message) -> None:
        """Forward a message."""
        self._worth_a_warning = len(pubsub_msg.data) >= WARNING_BYTES
        await super().publish(msg_forwarder, pubsub_msg)
        self.recent_message_deliveries.clear()
        self.recent_peer_connections.clear()

    async def _emit_idontwant_for_message(self, msg_id: bytes, topic_ids: Iterable[str]) -> None:
        # The specification: only for messages that are much larger than the warning itself.
        if self._worth_a_warning:
            await super()._emit_idontwant_for_message(msg_id, topic_ids)


class Gossip:
    """The topics of one host."""

    def __init__(self) -> None:
        self.topics: dict[str, GossipValidator] = {}
        self.readers: dict[str, Broadcast[GossipMessage]] = {}
        self.dropped = 0
        self.scores = Scores(())
        self._pubsub: _GuardedPubsub | None = None

    def join(self, topic: str, validator: GossipValidator) -> None:
        """Take part in a topic; before `start`."""
        self.topics[topic] = validator
        self.readers[topic] = Broadcast(READER_CAPACITY)

    async def start(self, nursery: trio.Nursery, host: GuardedHost) -> None:
        """Subscribe to the topics and serve the protocol."""
        self.scores = Scores(tuple(self.topics))
        router = Router(self.scores)
        pubsub = _GuardedPubsub(host, router, self)
        for topic in self.topics:
            pubsub.set_topic_validator(topic, self._validate, is_async_validator=False)
        await start_service(nursery, pubsub)
        await start_service(nursery, router)
        await pubsub.wait_until_ready()
        for topic in self.topics:
            await pubsub.subscribe(topic)
        self._pubsub = pubsub

    def stopped(self) -> None:
        """Let the readers come to their end."""
        self._pubsub = None
        for reader in self.readers.values():
            reader.end()

    def _validate(self, forwarder: ID, message: rpc_pb2.Message) -> bool:
        topic = message.topicIDs[0]
        try:
            source = parse_peer_id(ID(message.from_id).to_base58())
            return self.topics[topic](source, message.data)
        except UntimelyError:
            return False  # by our clock: the neighbour's may say otherwise
        except RemoteProtocolError as error:
            logger.debug("an invalid message came from %s: %s", forwarder, error)
            self.scores.invalid(forwarder, topic)
            return False
        except Exception as error:  # noqa: BLE001  # the bytes are a stranger's, and a validator that raises says no
            logger.debug("a gossip validator raised: %r", error)
            return False

    @asynccontextmanager
    async def subscribe(self, topic: str) -> AsyncIterator[AsyncIterator[GossipMessage]]:
        """Read what others publish on a joined topic."""
        if topic not in self.readers:
            raise NetworkError(f"the topic {topic} was not joined")
        with self.readers[topic].reader() as reader:
            yield reader

    async def publish(self, topic: str, data: bytes) -> None:
        """Gossip a message."""
        if topic not in self.topics:
            raise NetworkError(f"the topic {topic} was not joined")
        if len(data) > MAX_MESSAGE_BYTES:
            raise NetworkError(f"a gossip message has at most {MAX_MESSAGE_BYTES} bytes, not {len(data)}")
        if self._pubsub is None:
            raise NetworkError("the network is not running")
        await self._pubsub.publish(topic, data)
