"""A chain session: a peer asks a neighbour for what it missed. Everything that comes is checked, so anybody will do."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final

import trio

from node.consensus.chain_node import ChainNode
from node.network import channel
from node.network.channel import Channel
from node.network.interface import NetworkError, Stream
from protocol.chains import (
    Ask,
    Busy,
    ChainConnection,
    Have,
    Items,
    Rest,
    StatePart,
    Want,
    fill_items,
)
from protocol.consensus import SignedMessage
from protocol.consensus_values import Statement
from protocol.errors import RemoteProtocolError
from protocol.limits import MAX_LOCATOR
from protocol.states import Role

MAX_ROUNDS: Final = 64
"""Questions in one session; a newcomer to a long chain needs several sessions."""

STATEMENTS_PER_ANSWER: Final = 64
MAX_ANSWER_BYTES: Final = 1 << 20
MAX_ANSWER_ITEMS: Final = 16_384
MAX_STATE_PARTS: Final = 1024
"""At most about 64 MiB, which is a state of 300,000 members: more is no state."""

BUSY_S: Final = 5
VERIFIED_AT_A_TIME: Final = 4

OpenEnvelope = Callable[[bytes], SignedMessage]


@dataclass(slots=True)
class Outcome(channel.Outcome):
    """What a session came to; records that were known are counted as well."""

    more: bool = False
    """There is more to ask for: the session had reached its bounds."""


class Initiation:
    """The initiator's side of one session."""

    def __init__(self, stream: Stream, keeper: ChainNode, open_envelope: OpenEnvelope) -> None:
        self.outcome = Outcome()
        self._channel = Channel(stream, ChainConnection(Role.INITIATOR), self.outcome)
        self._keeper = keeper
        self._open_envelope = open_envelope
        self._reached: bytes | None = None

    async def run(self) -> None:
        """Ask until nothing is left to ask for, or the session's bounds are reached; `outcome` tells what came of it.

        Raises NetworkError when the session broke, RemoteProtocolError when the peer cheated.
        """
        keeper = self._keeper
        for _ in range(MAX_ROUNDS):
            async with keeper.lock:
                locator, digest = keeper.replica.locator(), keeper.replica.log.digest()
            # A branch that does not outweigh ours before all of it is here is asked for from where it has come to.
            reached = self._reached
            locator = (*((reached,) if reached else ()), *locator)[:MAX_LOCATOR]
            await self._channel.say(Ask(chain=keeper.genesis, locator=locator, digest=digest))
            rest = await self._take()
            if rest is not Rest.STANDING:
                break
            if self._reached is None or self._reached == reached or self._reached not in keeper.replica.chain:
                raise NetworkError("statements came that do not follow from any that we hold")
        else:
            self.outcome.more = True
            return
        if rest is Rest.RECENT:
            async with keeper.lock:
                ids = tuple(keeper.replica.log.recent())
            await self._channel.say(Have(ids))
            await self._take()
        await self._learn_state()

    async def _take(self) -> Rest | None:
        """Take in the records of one answer; return what it left out, None where the peer is busy."""
        last: Items | None = None
        count = 0
        while last is None or not last.last:
            message = await self._channel.hear_any()
            if isinstance(message, Busy):
                self.outcome.retry_s = float(message.retry_s)
                return None
            if not isinstance(message, Items):
                raise NetworkError("the peer ended the session")
            last = message
            count += len(message.envelopes)
            if count > MAX_ANSWER_ITEMS:
                raise RemoteProtocolError("an answer without an end")
            said = []
            for number, envelope in enumerate(message.envelopes, 1):
                each = self._open_envelope(envelope)
                if each.body.chain != self._keeper.genesis:
                    raise RemoteProtocolError("a record of another chain came")
                said.append(each)
                if isinstance(statement := each.body, Statement):
                    self._reached = statement.id
                if number % VERIFIED_AT_A_TIME == 0:
                    await trio.lowlevel.checkpoint()
            self._keeper.receive(said)
        self.outcome.received += count
        if count:
            await self._keeper.turn()
        return last.rest

    async def _learn_state(self) -> None:
        """Get the state after the head, where it does not follow from what we hold."""
        async with self._keeper.lock:
            head = self._keeper.replica.chain.head
            known = not self._keeper.replica.is_state_missing()
        if known or self.outcome.retry_s is not None:
            return
        await self._channel.say(Want(head.id))
        parts: list[StatePart] = []
        while not parts or not parts[-1].last:
            parts.append(await self._channel.hear(StatePart))
            if len(parts) > MAX_STATE_PARTS:
                raise RemoteProtocolError("a state without an end")
        if len(parts) > 1 and not await self._keeper.adopt_state(parts):
            async with self._keeper.lock:
                moved = self._keeper.replica.chain.head is not head
            if not moved:
                raise RemoteProtocolError("a state came that the statement does not name")


class Response:
    """The responder's side of one session. `pay_traffic` makes it wait for its allowance of bytes."""

    def __init__(self, stream: Stream, pay_traffic: Callable[[int], Awaitable[None]]) -> None:
        self.outcome = Outcome()
        self._channel = Channel(stream, ChainConnection(Role.RESPONDER), self.outcome)
        self._pay_traffic = pay_traffic

    async def refuse(self) -> None:
        """Send the initiator away for some seconds."""
        if await self._channel.hear_any() is not None:
            await self._channel.say(Busy(retry_s=BUSY_S))

    async def run(self, keepers: Callable[[bytes], ChainNode | None]) -> None:
        """Answer until the initiator ends the session. Raises NetworkError, StorageError and RemoteProtocolError."""
        ask = await self._channel.hear(Ask)
        if (keeper := keepers(ask.chain)) is None:
            await self._channel.say(Busy(retry_s=12 * BUSY_S))
            return
        await self._answer(keeper, ask)
        for _ in range(MAX_ROUNDS + 2):  # the questions, what is held, and the state
            if (message := await self._channel.hear_any()) is None:
                return
            match message:
                case Ask(chain=chain):
                    if chain != keeper.genesis:
                        raise RemoteProtocolError("one session asked about two chains")
                    await self._answer(keeper, message)
                case Have(ids):
                    await self._hand_over(keeper, frozenset(ids))
                case Want(statement):
                    for part in await keeper.parts_after(statement):
                        await self._pay_traffic(await self._channel.say(part))
                case _:
                    raise AssertionError(f"the table of states lets {message} through to a responder")
        raise RemoteProtocolError("questions without an end")

    async def _answer(self, keeper: ChainNode, ask: Ask) -> None:
        found = await keeper.store.epoch_of(keeper.genesis, ask.locator)
        after = -1 if found is None else found
        statements = await keeper.store.statements(keeper.genesis, after_epoch=after, limit=STATEMENTS_PER_ANSWER)
        envelopes: list[bytes] = []
        size = 0
        complete = len(statements) < STATEMENTS_PER_ANSWER
        for each in statements:
            if size > MAX_ANSWER_BYTES:
                complete = False
                break
            envelopes += (each.envelope, *each.signatures)
            size += len(each.envelope) + sum(map(len, each.signatures))
        rest = Rest.STANDING
        if complete:
            async with keeper.lock:
                rest = Rest.NOTHING if keeper.replica.log.digest() == ask.digest else Rest.RECENT
        await self._send(envelopes, rest)

    async def _hand_over(self, keeper: ChainNode, held: frozenset[bytes]) -> None:
        async with keeper.lock:
            recent = keeper.replica.log.recent()
        await self._send([said.envelope for key, said in recent.items() if key not in held], Rest.NOTHING)

    async def _send(self, envelopes: list[bytes], rest: Rest) -> None:
        self.outcome.sent += len(envelopes)
        for items in fill_items(envelopes, rest):
            await self._pay_traffic(await self._channel.say(items))
