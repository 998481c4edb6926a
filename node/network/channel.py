"""A stream with a conversation on it: says and hears whole messages, and counts what they cost."""

from collections import deque
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

import trio

from node.network.interface import NetworkError, Stream
from protocol.conversation import Conversation, M, S

SILENCE_S: Final = 15.0
"""How long one side waits for the other to say something."""

_E = TypeVar("_E")


@dataclass(slots=True)
class Outcome:
    """What a session on a channel came to. `received`, `sent`: records, as the session counts them."""

    received: int = 0
    sent: int = 0
    bytes_received: int = 0
    bytes_sent: int = 0
    retry_s: float | None = None
    """The responder is busy for so long."""


class Channel(Generic[M, S]):
    """One end of a conversation over a stream."""

    def __init__(self, stream: Stream, conversation: Conversation[M, S], outcome: Outcome) -> None:
        self._stream = stream
        self._conversation = conversation
        self._outcome = outcome
        self._heard: deque[M] = deque()

    async def say(self, message: M) -> int:
        """Send a message; return how many bytes it took. Raises NetworkError."""
        data = self._conversation.send(message)
        await self._stream.send_all(data)
        self._outcome.bytes_sent += len(data)
        return len(data)

    async def hear_any(self) -> M | None:
        """Return the next message, None at the end. Raises NetworkError and RemoteProtocolError."""
        while not self._heard:
            with trio.move_on_after(SILENCE_S) as scope:
                data = await self._stream.receive_some()
            if scope.cancelled_caught:
                raise NetworkError(f"nothing heard for {SILENCE_S:g} s")
            self._outcome.bytes_received += len(data)
            self._heard += self._conversation.receive_data(data)
            if not data:
                return None
        return self._heard.popleft()

    async def hear(self, expected: type[_E]) -> _E:
        """Return the next message, which by the state of the conversation is of this type. Raises as `hear_any`."""
        message = await self.hear_any()
        if not isinstance(message, expected):
            raise NetworkError("the peer ended the session")
        return message
