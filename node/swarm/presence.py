"""Who is here: a newcomer asks its first neighbours, and this node answers those that ask it.

In a large swarm heartbeats are rare: a newcomer that only listened would know of few peers for a minute or more.
"""

from collections.abc import Callable

import structlog
import trio

from node.network.interface import Network, NetworkError, Stream
from node.swarm.directory import Directory
from node.util.token_bucket import TokenBucket
from protocol.identity import PeerId
from protocol.presence import PROTOCOL_ID, PresenceReader, encode_present

ANSWERS_PER_S = 2.0
ANSWERS_AT_ONCE = 20
"""Whoever asks when this is used up is told of nobody; it will have asked others, too."""

ANSWER_TIMEOUT_S = 10.0

_logger = structlog.get_logger(__name__)


class PresenceServer:
    """Tells those who ask whom we heard last, of those that we have reached: hearsay is not handed on."""

    def __init__(self, directory: Directory) -> None:
        self._directory = directory
        self._allowance = TokenBucket(ANSWERS_PER_S, ANSWERS_AT_ONCE, trio.current_time())

    async def handle(self, stream: Stream) -> None:
        """Serve one stream."""
        if not self._allowance.take(1, trio.current_time()):
            return
        heartbeats = [presence.envelope for presence in self._directory.reached() if presence.envelope is not None]
        try:
            with trio.move_on_after(ANSWER_TIMEOUT_S):
                for frame in encode_present(heartbeats):
                    await stream.send_all(frame)
        except NetworkError as error:
            _logger.debug("presence not told", peer=stream.peer, reason=str(error))


async def ask_who_is_here(network: Network, peer: PeerId, hear: Callable[[bytes], bool]) -> None:
    """Have a neighbour tell whom it heard last: `hear` takes each heartbeat, of which none is verified.

    It returns whether to go on: no neighbour may tell of any number of peers.

    Raises NetworkError, also when the answer takes too long, and RemoteProtocolError, as `hear` may.
    """
    reader = PresenceReader()
    with trio.move_on_after(ANSWER_TIMEOUT_S):
        stream = await network.open_stream(peer, PROTOCOL_ID)
        try:
            while data := await stream.receive_some():
                for envelope in reader.receive_data(data):
                    if not hear(envelope):
                        return
                    await trio.lowlevel.checkpoint()
            reader.receive_data(b"")
        finally:
            await stream.aclose()
        return
    raise NetworkError(f"the answer took longer than {ANSWER_TIMEOUT_S:g} s")
