"""One chain session: a peer fetches the statements, records and state that it missed, and verifies them."""

from collections.abc import Callable, Sequence
from typing import Final

import trio

from node.consensus.chain_node import ChainNode
from node.network.interface import NetworkError, Stream
from node.replication.session import Responder, Session, Throttle
from protocol.chains import (
    ChainConnection,
    ChainState,
    GetState,
    GetStatements,
    Inventory,
    Message,
    Records,
    Remaining,
    StatePart,
    fill_records,
)
from protocol.consensus import SignedMessage
from protocol.consensus_values import Statement
from protocol.errors import RemoteProtocolError
from protocol.half_duplex import Busy
from protocol.limits import MAX_LOCATOR
from protocol.states import Role

MAX_ROUNDS: Final = 64
"""Requests in one session; a newcomer to a long chain needs several sessions."""

STATEMENTS_PER_ANSWER: Final = 64
MAX_ANSWER_BYTES: Final = 1 << 20
MAX_ANSWER_RECORDS: Final = 16_384
MAX_STATE_PARTS: Final = 1024
"""About 64 MiB, the state of 300,000 members: more is a violation."""

UNKNOWN_CHAIN_S: Final = 60
"""Pause for a peer that asks about a chain that is not followed here."""

VERIFIED_AT_A_TIME: Final = 4


class ChainInitiator(Session[Message, ChainState]):
    """The side that begins a session, and fetches."""

    def __init__(
        self,
        stream: Stream,
        throttle: Throttle,
        chain: ChainNode,
        verify: Callable[[bytes], SignedMessage],
        forward: Callable[[Sequence[SignedMessage]], None],
    ) -> None:
        """`forward`: gossips what all others must have as well, unless they got it by gossip."""
        super().__init__(stream, ChainConnection(Role.INITIATOR), throttle)
        self._chain = chain
        self._verify = verify
        self._forward = forward
        self._reached: bytes | None = None
        """The last statement that was received."""

    async def run(self) -> None:
        """Fetch until nothing is missing, or a bound of the session is reached."""
        for _ in range(MAX_ROUNDS):
            locator, digest = await self._chain.position()
            # A branch replaces ours only once all of it is here; until then it continues from where it was cut.
            reached = self._reached
            locator = (*((reached,) if reached else ()), *locator)[:MAX_LOCATOR]
            await self._send(GetStatements(chain=self._chain.genesis, locator=locator, digest=digest))
            rest = await self._receive_records()
            if rest is not Remaining.STATEMENTS:
                break
            if self._reached is None or self._reached == reached or not self._chain.has_statement(self._reached):
                raise NetworkError("received statements that do not follow from any known one")
        else:
            self.outcome.more = True
            return
        if rest is Remaining.RECENT:
            await self._send(Inventory(tuple(await self._chain.recent_records())))
            await self._receive_records()
        if self.outcome.retry_s is None:
            await self._fetch_state()
            self.outcome.equal = True

    async def _receive_records(self) -> Remaining | None:
        """Pass the records of one answer to the chain; return what the answer left out, None from a busy peer."""
        last: Records | None = None
        count = 0
        while last is None or not last.last:
            message = await self._receive_any()
            if isinstance(message, Busy):
                self.outcome.retry_s = float(message.retry_s)
                return None
            if not isinstance(message, Records):
                raise NetworkError("the peer ended the session")
            last = message
            count += len(message.envelopes)
            if count > MAX_ANSWER_RECORDS:
                raise RemoteProtocolError(f"an answer has more than {MAX_ANSWER_RECORDS} records")
            records = await self._verified(message.envelopes)
            self._chain.receive(records)
            self._forward(records)
        self.outcome.received += count
        if count:
            await self._chain.next_turn()
        return last.rest

    async def _verified(self, envelopes: Sequence[bytes]) -> list[SignedMessage]:
        records = []
        for number, envelope in enumerate(envelopes, 1):
            record = self._verify(envelope)
            if record.body.chain != self._chain.genesis:
                raise RemoteProtocolError("received a record of another chain")
            records.append(record)
            if isinstance(statement := record.body, Statement):
                self._reached = statement.id
            if number % VERIFIED_AT_A_TIME == 0:
                await trio.lowlevel.checkpoint()
        return records

    async def _fetch_state(self) -> None:
        """Fetch the state after the head, if it cannot be computed here."""
        head = await self._chain.head_without_state()
        if head is None:
            return
        await self._send(GetState(head))
        parts: list[StatePart] = []
        while not parts or not parts[-1].last:
            parts.append(await self._receive(StatePart))
            if len(parts) > MAX_STATE_PARTS:
                raise RemoteProtocolError(f"a state has more than {MAX_STATE_PARTS} parts")
        is_unknown_there = len(parts) == 1
        if is_unknown_there or await self._chain.adopt_state(parts):
            return
        if await self._chain.head_without_state() == head:
            raise RemoteProtocolError("received a state that differs from the digests of its statement")


class ChainResponder(Responder[Message, ChainState]):
    """The side that answers, about one chain in a session."""

    def __init__(self, stream: Stream, throttle: Throttle, chains: Callable[[bytes], ChainNode | None]) -> None:
        super().__init__(stream, ChainConnection(Role.RESPONDER), throttle)
        self._chains = chains

    async def run(self) -> None:
        """Answer until the initiator ends the session."""
        ask = await self._receive(GetStatements)
        if (chain := self._chains(ask.chain)) is None:
            await self._send(Busy(retry_s=UNKNOWN_CHAIN_S))
            return
        await self._answer(chain, ask)
        for _ in range(MAX_ROUNDS + 2):  # the requests, the inventory, and the state
            if (message := await self._receive_any()) is None:
                return
            match message:
                case GetStatements(chain=genesis):
                    if genesis != chain.genesis:
                        raise RemoteProtocolError("one session asked about two chains")
                    await self._answer(chain, message)
                case Inventory(ids):
                    recent, held = await chain.recent_records(), frozenset(ids)
                    await self._send_records([record.envelope for key, record in recent.items() if key not in held])
                case GetState(statement):
                    for part in await chain.parts_after(statement):
                        await self._send(part)
                case _:
                    raise AssertionError(f"the table of states lets {message} through to a responder")
        raise RemoteProtocolError(f"a session has more than {MAX_ROUNDS} requests")

    async def _answer(self, chain: ChainNode, ask: GetStatements) -> None:
        statements = await chain.branch_after(ask.locator, STATEMENTS_PER_ANSWER)
        envelopes: list[bytes] = []
        size = 0
        complete = len(statements) < STATEMENTS_PER_ANSWER
        for each in statements:
            if size > MAX_ANSWER_BYTES:
                complete = False
                break
            envelopes += (each.envelope, *each.signatures)
            size += len(each.envelope) + sum(map(len, each.signatures))
        rest = Remaining.STATEMENTS
        if complete:
            _, digest = await chain.position()
            rest = Remaining.NOTHING if digest == ask.digest else Remaining.RECENT
        await self._send_records(envelopes, rest)

    async def _send_records(self, envelopes: Sequence[bytes], rest: Remaining = Remaining.NOTHING) -> None:
        self.outcome.sent += len(envelopes)
        for message in fill_records(envelopes, rest):
            await self._send(message)
