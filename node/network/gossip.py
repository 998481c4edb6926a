"""GossipSub: the library's, with every message isolated, rate-limited and counted when dropped."""

import logging
import math
import random
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Collection, Iterable, Sized
from contextlib import AbstractAsyncContextManager
from typing import Final

import trio
from cachetools import TTLCache
from libp2p.abc import INetStream
from libp2p.custom_types import TProtocol
from libp2p.network.stream.net_stream import NetStream
from libp2p.peer.id import ID
from libp2p.pubsub.gossipsub import GossipSub
from libp2p.pubsub.pb import rpc_pb2
from libp2p.pubsub.pubsub import Pubsub
from libp2p.pubsub.utils import safe_bytes_from_hex
from libp2p.tools.timed_cache.last_seen_cache import LastSeenCache

from node.network.addresses import address_range
from node.network.broadcast import Broadcast
from node.network.guarded_host import GuardedHost, start_service
from node.network.interface import GossipMessage, GossipValidator, NetworkError
from node.network.scores import Scores
from node.network.yamux import Yamux
from node.util.token_bucket import TokenBucket
from protocol.errors import RemoteProtocolError, UntimelyError
from protocol.identity import PeerId, parse_peer_id

logger = logging.getLogger(__name__)

PROTOCOLS: Final = (TProtocol("/meshsub/1.2.0"), TProtocol("/meshsub/1.1.0"))
MAX_MESSAGE_BYTES: Final = 64 << 10
READER_CAPACITY: Final = 1024
MAX_RATE_HZ: Final = 200.0
"""Rate limit of a neighbour's messages, its own and forwarded ones; twice as many in a burst."""

OUTBOUND_CAPACITY: Final = 512
ANNOUNCED_BYTES: Final = 4096
"""From this size on, IDONTWANT is sent before a message is forwarded, so that it does not arrive twice."""
DISCONNECT_DEBT: Final = 2000
"""A neighbour this many messages beyond its rate limit is disconnected."""
SEEN_LIFETIME_S: Final = 120.0
MAX_SEEN: Final = 65536
MAX_SEQUENCE_BYTES: Final = 64
MAX_MESH_PEERS_PER_RANGE: Final = 3
"""Of the 6 to 12 peers of a mesh, this many may be within one public /24 or /56."""
MAX_BACK_OFF_S: Final = 300
"""Longest pause before a GRAFT that a PRUNE may ask for."""


class _SeenMessages(LastSeenCache):
    """The ids of recent messages, bounded. The library's cache starts a thread and has no bound."""

    def __init__(self) -> None:
        self._ids: TTLCache[bytes, None] = TTLCache(MAX_SEEN, SEEN_LIFETIME_S, trio.current_time)

    def add(self, key: bytes) -> bool:
        """Remember an id; return whether it is new."""
        new = key not in self._ids
        self._ids[key] = None
        return new

    def has(self, key: bytes) -> bool:
        """Return whether an id is remembered; if so, its lifetime begins anew."""
        return not self.add(key) if key in self._ids else False


class _GuardedPubsub(Pubsub):
    """Pubsub that applies limits before the cost of a signature check, and that survives a reconnection.

    The library forgets a peer's subscriptions when its own stream to that peer breaks, although the peer, whose stream
    to us is whole, will not repeat them; and it keeps a dead stream when the peer has another connection.
    """

    def __init__(self, host: GuardedHost, router: "Router", gossip: "Gossip") -> None:
        super().__init__(host, router, strict_signing=True, allowed_topics=set(gossip.topics))
        self.seen_messages.stop()
        self.seen_messages = _SeenMessages()
        # The library counts from the second of the start: a restarted node would repeat ids that its neighbours have
        # seen within the last two minutes.
        self.counter = time.time_ns()
        self._gossip = gossip
        self._buckets: dict[ID, TokenBucket] = {}
        self._inbound: Counter[ID] = Counter()
        self._unverified: set[int] = set()

    async def stream_handler(self, stream: INetStream) -> None:
        """Read a peer's messages, for as long as its stream lasts."""
        peer = stream.muxed_conn.peer_id
        self._inbound[peer] += 1
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
        # Opening a stream would dial a peer that has just left, or that we have just disconnected.
        if self._peer_is_connected(peer_id):
            await super()._handle_new_peer(peer_id)

    async def handle_dead_peer_queue(self) -> None:
        """Handle lost connections; a peer that has another one gets a new stream."""
        async with self.dead_peer_receive_channel:
            self.event_handle_dead_peer_queue_started.set()
            async for peer_id in self.dead_peer_receive_channel:
                stream = self.peers.get(peer_id)
                dead = isinstance(stream, NetStream) and stream.is_closed
                if dead or not self._peer_is_connected(peer_id):
                    self._handle_dead_peer(peer_id)

    async def push_msg(self, msg_forwarder: ID, msg: rpc_pb2.Message) -> None:
        """Accept a message, from a peer or our own."""
        if msg_forwarder == self.my_id:
            await super().push_msg(msg_forwarder, msg)
            return
        if not self._is_within_limits(msg_forwarder, msg) or self._is_msg_seen(msg):
            return
        self._unverified.add(id(msg))
        try:
            await super().push_msg(msg_forwarder, msg)
            if id(msg) in self._unverified:  # it never reached its validator: the signature is invalid
                self._gossip.scores.invalid(msg_forwarder, msg.topicIDs[0])
        finally:
            self._unverified.discard(id(msg))

    async def validate_msg(self, msg_forwarder: ID, msg: rpc_pb2.Message) -> None:
        """Call the topic's validator, after the signature was verified."""
        self._unverified.discard(id(msg))
        await super().validate_msg(msg_forwarder, msg)

    def _is_within_limits(self, forwarder: ID, message: rpc_pb2.Message) -> bool:
        return (
            self._gossip.scores.allow_publish(forwarder, [])
            and self.spend(forwarder, 1)
            and len(message.topicIDs) == 1
            and message.topicIDs[0] in self._gossip.topics
            and len(message.data) <= MAX_MESSAGE_BYTES
            and len(message.seqno) <= MAX_SEQUENCE_BYTES
        )

    def spend(self, forwarder: ID, amount: int) -> bool:
        """Charge a neighbour; return whether it is within its rate limit. One far beyond it is disconnected."""
        now_s = trio.current_time()
        bucket = self._buckets.get(forwarder)
        if bucket is None:
            self._buckets = {peer: each for peer, each in self._buckets.items() if peer in self.peers}
            bucket = self._buckets[forwarder] = TokenBucket(MAX_RATE_HZ, 2 * MAX_RATE_HZ, now_s)
        debt = bucket.spend(amount, now_s) * MAX_RATE_HZ
        if debt <= 0:
            return True
        self._gossip.dropped += 1
        if debt > DISCONNECT_DEBT:
            self._disconnect(forwarder)
        return False

    def _disconnect(self, forwarder: ID) -> None:
        for connection in self.host.get_network().get_connections(forwarder):
            if isinstance(connection.muxed_conn, Yamux):
                connection.muxed_conn.abort("it floods us with gossip")

    def notify_subscriptions(self, publish_message: rpc_pb2.Message) -> None:
        """Pass a valid message to our readers."""
        if publish_message.from_id != self.my_id.to_bytes():
            source = PeerId(ID(publish_message.from_id).to_base58())
            self._gossip.readers[publish_message.topicIDs[0]].put(GossipMessage(source, publish_message.data))


class Router(GossipSub):
    """GossipSub that queues bursts, sends few IDONTWANTs, and drops the state of its adaptive mode, which is off.

    Control messages are rate-limited, those of unknown topics ignored, and peers that a PRUNE names are not dialled.
    Its meshes exclude peers with a bad score, and bound those within one public range of addresses.
    """

    _send_idontwant = False

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
        # And one of IWANTs, which punishes a neighbour that asks for a burst: they count in its rate limit, and for
        # each message once.
        self.max_iwant_requests_per_second = math.inf
        self.scorer: Scores = scores
        self._sent_to: defaultdict[bytes, set[ID]] = defaultdict(set)
        """The neighbours that requested a recent message."""

    def add_peer(self, peer_id: ID, protocol_id: TProtocol | None) -> None:
        """Add a neighbour."""
        self.scorer.returned(peer_id)
        super().add_peer(peer_id, protocol_id)

    async def handle_rpc(self, rpc: rpc_pb2.RPC, sender_peer_id: ID) -> None:
        """Serve a neighbour's requests within its rate limit, unless it is graylisted."""
        control = rpc.control
        kinds: tuple[Sized, ...] = (control.ihave, control.iwant, control.graft, control.prune, control.idontwant)
        entries = max(1, sum(map(len, kinds)))
        assert isinstance(self.pubsub, _GuardedPubsub)
        if not self.scorer.graylisted(sender_peer_id) and self.pubsub.spend(sender_peer_id, entries):
            await super().handle_rpc(rpc, sender_peer_id)

    async def handle_ihave(self, ihave_msg: rpc_pb2.ControlIHave, sender_peer_id: ID) -> None:
        """Request unknown messages of our topics."""
        if ihave_msg.topicID in self.mesh:
            await super().handle_ihave(ihave_msg, sender_peer_id)

    async def handle_iwant(self, iwant_msg: rpc_pb2.ControlIWant, sender_peer_id: ID) -> None:
        """Send requested messages, each once to a neighbour: the library sends one as often as it is requested."""
        unsent: list[bytes] = []
        for wanted in iwant_msg.messageIDs:
            message_id = safe_bytes_from_hex(wanted) or b""
            if message_id in self.mcache.msgs and sender_peer_id not in self._sent_to[message_id]:
                self._sent_to[message_id].add(sender_peer_id)
                unsent.append(wanted)
        if unsent:
            await super().handle_iwant(rpc_pb2.ControlIWant(messageIDs=unsent), sender_peer_id)

    async def handle_prune(self, prune_msg: rpc_pb2.ControlPrune, sender_peer_id: ID) -> None:
        """Leave the mesh of a neighbour, for one of our topics: for others the library keeps a backoff without end."""
        if prune_msg.topicID in self.mesh:
            await super().handle_prune(prune_msg, sender_peer_id)

    async def _do_px(self, px_peers: list[rpc_pb2.PeerInfo]) -> None:
        """Do not dial: any neighbour may name any addresses, and `node.swarm` decides whom to dial, within limits."""

    def _add_back_off(self, peer: ID, topic: str, is_unsubscribe: bool, backoff_duration: int = 0) -> None:
        super()._add_back_off(peer, topic, is_unsubscribe, min(backoff_duration, MAX_BACK_OFF_S))

    async def handle_graft(self, graft_msg: rpc_pb2.ControlGraft, sender_peer_id: ID) -> None:
        """Accept a neighbour into a mesh, if there is a place for it."""
        mesh = self.mesh.get(graft_msg.topicID)
        if mesh is None:
            return  # the specification: not even answered
        if sender_peer_id in mesh or self._has_place(sender_peer_id, mesh):
            await super().handle_graft(graft_msg, sender_peer_id)
        else:
            await self.emit_prune(graft_msg.topicID, sender_peer_id, False, False)

    async def on_peer_subscribed(self, peer_id: ID, topic: str) -> None:
        """Accept a neighbour that subscribes to a topic into its mesh, if there is a place for it."""
        if self._has_place(peer_id, self.mesh.get(topic, set())):
            await super().on_peer_subscribed(peer_id, topic)

    def mesh_heartbeat(self) -> tuple[defaultdict[ID, list[str]], defaultdict[ID, list[str]]]:
        """Keep every mesh at its size; peers with a bad score are pruned, expired backoffs and messages forgotten."""
        now_s = time.time()
        for message_id in self._sent_to.keys() - self.mcache.msgs.keys():
            del self._sent_to[message_id]
        for topic, back_off in self.back_off.items():
            # One further ahead than the longest is from before the clock was set back.
            lasting = {peer: until for peer, until in back_off.items() if now_s < until <= now_s + MAX_BACK_OFF_S}
            self.back_off[topic] = lasting
        expelled = [(peer, topic) for topic, mesh in self.mesh.items() for peer in mesh if self.scorer.of(peer) < 0]
        for peer, topic in expelled:
            self.mesh[topic].discard(peer)
            self._add_back_off(peer, topic, False)
        grafts, prunes = super().mesh_heartbeat()
        for peer, topic in expelled:
            prunes[peer].append(topic)
        return grafts, prunes

    def _get_in_topic_gossipsub_peers_from_minus(
        self, topic: str, num_to_select: int, minus: Iterable[ID], backoff_check: bool = False
    ) -> list[ID]:
        """Choose peers for a mesh, or for IHAVE: the library asks here for both."""
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
        """Return what a peer shares with others that may be the same party: a public range, or a relay."""
        assert self.pubsub is not None
        for connection in self.pubsub.host.get_network().get_connections(peer):
            if isinstance(connection.muxed_conn, Yamux):
                host, relay = connection.muxed_conn.host, connection.muxed_conn.relay
                return address_range(host) if host is not None else relay
        return None

    async def flush_pending_messages(self, peer_id: ID) -> None:
        """Send messages queued for a new peer; called as soon as it has its outbound queue."""
        if self.pubsub is not None and (queue := self.pubsub.peer_queues.get(peer_id)) is not None:
            # A queue of 32 loses most of a burst, for good: those in the mesh are offered nothing a second time.
            queue._queue.max_size = OUTBOUND_CAPACITY  # noqa: SLF001
        await super().flush_pending_messages(peer_id)

    async def publish(self, msg_forwarder: ID, pubsub_msg: rpc_pb2.Message) -> None:
        """Forward a message."""
        self._send_idontwant = len(pubsub_msg.data) >= ANNOUNCED_BYTES
        await super().publish(msg_forwarder, pubsub_msg)
        self.recent_message_deliveries.clear()
        self.recent_peer_connections.clear()

    async def _emit_idontwant_for_message(self, msg_id: bytes, topic_ids: Iterable[str]) -> None:
        # The specification: only for messages much larger than the IDONTWANT itself.
        if self._send_idontwant:
            await super()._emit_idontwant_for_message(msg_id, topic_ids)


class Gossip:
    """The topics of one host."""

    def __init__(self) -> None:
        self.topics: dict[str, GossipValidator] = {}
        self.readers: dict[str, Broadcast[GossipMessage]] = {}
        self.dropped = 0
        self.scores = Scores(())
        self._pubsub: _GuardedPubsub | None = None

    def join_topic(self, topic: str, validator: GossipValidator) -> None:
        """Join a topic; before `start`."""
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
        """End the readers."""
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
        except Exception as error:  # noqa: BLE001  # the bytes are untrusted, and a validator that raises says no
            logger.debug("a gossip validator raised: %r", error)
            return False

    def subscribe(self, topic: str) -> AbstractAsyncContextManager[AsyncIterator[GossipMessage]]:
        """Subscribe to a joined topic."""
        if topic not in self.readers:
            raise NetworkError(f"the topic {topic} was not joined")
        return self.readers[topic].reader()

    async def publish(self, topic: str, data: bytes) -> None:
        """Gossip a message."""
        if topic not in self.topics:
            raise NetworkError(f"the topic {topic} was not joined")
        if len(data) > MAX_MESSAGE_BYTES:
            raise NetworkError(f"a gossip message has at most {MAX_MESSAGE_BYTES} bytes, not {len(data)}")
        if self._pubsub is None:
            raise NetworkError("the network is not running")
        await self._pubsub.publish(topic, data)
