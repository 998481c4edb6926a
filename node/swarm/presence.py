"""Presence queries: a newcomer asks its first neighbours which peers are alive, and this node answers such queries.

In a large swarm heartbeats are rare: by gossip alone a newcomer would know few peers for a minute or more.
"""

from collections.abc import Callable

import structlog
import trio
from cachetools import LRUCache

from node.network.interface import Network, NetworkError, Stream
from node.swarm.directory import Directory
from node.util.token_bucket import Allowance, TokenBucket
from protocol.identity import PeerId
from protocol.presence import PROTOCOL_ID, PresenceReader, encode_present

ANSWERS_PER_S = 2.0
ANSWERS_BURST = 20
"""Beyond this rate limit of all peers together queries are refused; the newcomer asks others, too."""

ANSWERS_PER_PEER = Allowance(0.1, 3)
"""So that one peer does not exhaust it."""

MAX_PEERS = 1024
"""Peers whose queries are counted; the least recently seen one is evicted."""

ANSWER_TIMEOUT_S = 10.0

_logger = structlog.get_logger(__name__)


class PresenceServer:
    """Answers queries with the last heartbeats of the peers that we have reached: it relays no unverified ones."""

    def __init__(self, directory: Directory) -> None:
        self._directory = directory
        self._rate_limit = TokenBucket(ANSWERS_PER_S, ANSWERS_BURST, trio.current_time())
        self._limits: LRUCache[PeerId, TokenBucket] = LRUCache(MAX_PEERS)

    async def handle(self, stream: Stream) -> None:
        """Serve one stream; reset it where the query is refused, as an end would be an answer without peers."""
        now_s = trio.current_time()
        limit = self._limits.setdefault(stream.peer, ANSWERS_PER_PEER.bucket(now_s))
        if not (limit.take(1, now_s) and self._rate_limit.take(1, now_s)):
            await stream.reset()
            return
        heartbeats = [entry.envelope for entry in self._directory.reached() if entry.envelope is not None]
        try:
            with trio.move_on_after(ANSWER_TIMEOUT_S):
                for frame in encode_present(heartbeats):
                    await stream.send_all(frame)
        except NetworkError as error:
            _logger.debug("presence answer not sent", peer=stream.peer, reason=str(error))


async def query_presence(network: Network, peer: PeerId, on_heartbeat: Callable[[bytes], bool]) -> int:
    """Query a neighbour, and return the number of heartbeats that it sent.

    `on_heartbeat` takes each envelope, unverified, and returns whether to read on. Raises NetworkError, also for an
    answer that takes too long, and RemoteProtocolError, as `on_heartbeat` may.
    """
    reader, count = PresenceReader(), 0
    with trio.move_on_after(ANSWER_TIMEOUT_S):
        stream = await network.open_stream(peer, PROTOCOL_ID)
        try:
            while data := await stream.receive_some():
                for envelope in reader.receive_data(data):
                    count += 1
                    if not on_heartbeat(envelope):
                        return count
                    await trio.lowlevel.checkpoint()
            reader.receive_data(b"")
        finally:
            await stream.aclose()
        return count
    raise NetworkError(f"presence answer took longer than {ANSWER_TIMEOUT_S:g} s")
