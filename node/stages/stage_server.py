"""The stages of this node: admits the sessions that coordinators open here, begins them and ends them.

What a session is and what becomes of its rows is in `session` and `span`.
"""

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace

import structlog
import trio
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from node.engine.base import Engine
from node.engine.interface import DIVISIBLE_ENGINES, PAGE_POSITIONS, EngineError, EngineFull, SpanInfo, Variant
from node.links.base_link import LinkBroken
from node.links.inbound_link import InboundLink
from node.links.link_pool import LinkPool
from node.network.interface import Network
from node.stages.draft_model import DraftModel
from node.stages.fair_share import may_take
from node.stages.peer_records import PeerRecords, StagePeerStatistics, is_worth_logging
from node.stages.replay_buffer import REPLAY_BYTES
from node.stages.session import StageSession
from node.stages.span import Span, pages_of
from node.stages.speculation import Drafter, PromptLookup
from node.stages.stage_policy import PolicyController
from node.stages.voting import Agreement, HeuristicVoter, Voter
from protocol.announcements import ServedSpan
from protocol.identity import BlockRange, ModelId, PeerId, SessionId
from protocol.limits import MAX_SESSIONS, MAX_STAGES, PREFIX_HASH_BYTES
from protocol.measurements import StageObservation
from protocol.messages import (
    Begin,
    Closed,
    FailureReason,
    Load,
    Open,
    Opened,
    Progress,
    RefusalReason,
    Refused,
    SessionStatistics,
    TokenHistory,
)
from protocol.observations import countersign
from selector.task import Method, MethodError, TaskContext, parse_method
from selector.voting import tally, weights_of

JOIN_LIMIT_S = 8.0
"""How long it may take to reach those that a session's outputs go to; whoever opens it waits for a little longer."""

DESCRIPTION_BYTES = 32 << 20
"""What the descriptions of all sessions may take, those that are being opened included: shared like KV memory."""

RETIRE_S = 5.0
"""How long a span that is about to go takes what comes from peers who have not heard so yet."""


_logger = structlog.get_logger(__name__)


class StageServer:
    """All spans of this node: admits sessions and ends them."""

    def __init__(
        self,
        network: Network,
        agent: str,
        *,
        private_key: Ed25519PrivateKey,
        hardware: Callable[[], str],
        voter: Voter | None = None,
        controller: Callable[[], PolicyController] = PolicyController,
        agreed: Callable[[ModelId], Agreement | None] = lambda model: None,
    ) -> None:
        """Serve nothing yet.

        `private_key` countersigns what jobs cost here; `hardware` names what they ran on. `voter` says what methods are
        expected to cost; `controller` makes, for each span, what decides over its policy; `agreed` says what the swarm
        has agreed about a model.
        """
        self.draining = False
        self._voter = voter or HeuristicVoter()
        self._controller = controller
        self._private_key = private_key
        self._hardware = hardware
        self._agreed = agreed
        self.link_pool = LinkPool(network, agent, self)
        self._spans: dict[tuple[ModelId, BlockRange], Span] = {}
        self._drafts: dict[ModelId, DraftModel | None] = {}
        """What guesses for jobs on a model whose first blocks are served here; None while it is being loaded."""
        self._retiring: set[Span] = set()
        """Spans that are about to go: nobody is told of them any more."""
        self._retired: set[Span] = set()
        """Of those, the ones that take nothing new any more."""
        self._session_ended = trio.lowlevel.ParkingLot()
        self._records = PeerRecords()
        self._opening_bytes: defaultdict[PeerId, int] = defaultdict(int)
        """What the descriptions of sessions take that are being opened."""

    def peer_statistics(self) -> Mapping[PeerId, StagePeerStatistics]:
        """Return what each peer has asked of the stages here, how that went, and what it holds now.

        Bounded: of those who hold nothing, the peers that were heard last.
        """
        found = dict(self._records.statistics())
        for span in self.spans():
            for session in span.sessions.values():
                peer = session.opened_by.peer
                so_far = found.get(peer, StagePeerStatistics())
                found[peer] = replace(
                    so_far,
                    sessions=so_far.sessions + 1,
                    positions=so_far.positions + session.reserved_positions,
                    bytes=so_far.bytes + session.held_bytes,
                )
        return found

    def spans(self) -> tuple[Span, ...]:
        """Return the spans that are served now."""
        return tuple(self._spans.values())

    def served_spans(self) -> tuple[ServedSpan, ...]:
        """Return the spans that are served now, as heartbeats tell them; none once this node is about to leave."""
        if self.draining:
            return ()
        return tuple(
            ServedSpan(model=s.info.model, blocks=s.info.blocks, load=s.load())
            for s in self.spans()
            if s not in self._retiring
        )

    async def wait_idle(self) -> None:
        """Wait until no session is open here."""
        while any(span.sessions for span in self.spans()):
            await self._session_ended.park()

    def retire(self, span: Span) -> None:
        """Tell nobody of a span any more, which is about to go."""
        self._retiring.add(span)

    async def wait_retired(self, span: Span) -> None:
        """Wait until those who heard of the span before have ended their sessions on it; it takes no further ones."""
        await trio.sleep(RETIRE_S)
        self._retired.add(span)
        while span.sessions:
            await self._session_ended.park()

    async def serve(
        self,
        engine: Engine,
        replay_bytes: int = REPLAY_BYTES,
        *,
        task_status: trio.TaskStatus[Span] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Serve an engine's span until cancelled, or until its worker is gone; sessions that are left then fail.

        The latter raises EngineCrashed, in a group. `replay_bytes`: for outputs that are kept for replays.
        """
        key = (engine.info.model, engine.info.blocks)
        if key in self._spans:
            raise EngineError(f"blocks {engine.info.blocks} are served already")
        span = self._spans[key] = Span(
            engine, self.link_pool, self._session_ended, self._controller(), replay_bytes, self._records
        )
        try:
            async with trio.open_nursery() as nursery:
                await nursery.start(span.run)
                task_status.started(span)
        finally:
            del self._spans[key]
            self._retiring.discard(span)
            self._retired.discard(span)

    async def guess(
        self,
        engine: Engine,
        variant: Variant,
        models: Collection[ModelId],
        *,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Guess with the engine of a whole model what others will say, until cancelled, or until its worker is gone.

        `models`: those that have the same tokens. A worker that is gone raises EngineCrashed, in a group.
        """
        draft = DraftModel(engine, variant)
        async with trio.open_nursery() as nursery:
            await nursery.start(draft.run)
            self._drafts |= dict.fromkeys(models, draft)
            task_status.started()
            try:
                await trio.sleep_forever()
            finally:
                self.expect_guesses(models)

    def expect_guesses(self, models: Iterable[ModelId]) -> None:
        """Say that methods with a draft model will be offered for these models, and are not yet."""
        self._drafts |= dict.fromkeys(models)

    async def open(self, message: Open, link: InboundLink) -> Opened | Refused:
        """Admit a session if its blocks are served here, with KV memory for it, and the next stage can be reached.

        One that continues another has its memory already. A peer at whose fault rows could not be taken waits.
        """
        size, peer, held = _description_bytes(message), link.peer, self._described_bytes()
        answer: Opened | Refused
        if not may_take(peer, size, own=self.link_pool.peer_id, pages=DESCRIPTION_BYTES, held=held):
            why = (
                f"no memory to describe another session: {held.get(peer, 0)} bytes are held for yours, the rest of "
                f"{DESCRIPTION_BYTES} is held, or reserved, for others"
            )
            answer = _refusal(message, RefusalReason.FULL, why, None)
        else:
            self._opening_bytes[peer] += size
            try:
                penalty_s = self._records.penalty_s(peer, trio.current_time())
                if penalty_s and peer != self.link_pool.peer_id:
                    await trio.sleep(penalty_s)
                answer = await self._admit(message, link)
            finally:
                self._opening_bytes[peer] -= size
                if not self._opening_bytes[peer]:
                    del self._opening_bytes[peer]
        if isinstance(answer, Opened):
            self._records.opened(link.peer)
        else:
            count = self._records.refused(link.peer, answer.reason)
            if is_worth_logging(count):
                session = str(message.session)
                _logger.info("session refused", peer=link.peer, session=session, reason=answer.message, count=count)
        return answer

    def _described_bytes(self) -> Mapping[PeerId, int]:
        """Return what the descriptions of each peer's sessions take."""
        found = defaultdict(int, self._opening_bytes)
        for span in self.spans():
            for session in span.sessions.values():
                if session.opened.is_set():  # else it is counted as one that is being opened
                    found[session.opened_by.peer] += session.description_bytes
        return found

    async def _admit(self, message: Open, link: InboundLink) -> Opened | Refused:
        former = self._former(message, link)
        span = former.span if former else self._span_of(message.model, message.blocks)
        if former is None and (objection := self._objection(message, link.peer)):
            return _refusal(message, *objection, span)
        if span is None:
            return _refusal(message, RefusalReason.NOT_SERVED, f"blocks {message.blocks} are not served here", None)
        if fault := _fault_of(message, span.info.part(message.blocks)):
            return _refusal(message, RefusalReason.INVALID, fault, span)
        offered, hoped_for = _offered(message, span, self._drafts)
        if not offered:
            return _refusal(message, *_why_nothing(hoped_for), span)
        return await self._open_on(span, message, link, former, offered)

    async def _open_on(
        self,
        span: Span,
        message: Open,
        link: InboundLink,
        former: StageSession | None,
        offered: Sequence[Method],
    ) -> Opened | Refused:
        session = StageSession(message, span, link, _description_bytes(message))
        try:
            self.link_pool.registry.add(message.session, session)
        except KeyError:
            return _refusal(message, RefusalReason.INVALID, "the session is open already", span)
        span.add(session)
        try:
            await self._join(session, message)
            if former is None or former.ended.is_set() or not await span.carry_on(former, session):
                self._reserve(session)
                session.cached = await span.engine.open(message.session, message.positions, session.prefix)
            session.votes = dict(await self._voter.vote(TaskContext.of(message.context), offered))
            session.agreed = self._agreed(message.model)
        except LinkBroken as broken:
            refused = RefusalReason.UNREACHABLE, f"cannot reach {broken.peer}: {broken}"
        except EngineFull as error:
            span.turn_away(link.peer, pages_of(message.positions))
            refused = RefusalReason.FULL, str(error)
        except EngineError as error:
            refused = RefusalReason.NOT_SERVED, str(error)
        else:
            if session.ended.is_set():  # the coordinator went away while the engine reserved memory
                return _refusal(message, RefusalReason.INVALID, "closed while it was opened", span)
            # One that goes on with another that has not begun has no more time than that one had.
            is_unbegun = former is not None and former.method is None
            session.opened_s = former.opened_s if former and is_unbegun else trio.current_time()
            return Opened(
                session=message.session,
                load=span.load(),
                votes=session.votes,
                cached={str(kv_key): positions for kv_key, positions in session.cached.items()},
                policy=span.policy,
                held=session.computed,
                kept_from=session.replay_from,
                statement=session.agreed.statement if session.agreed else None,
            )
        finally:
            session.opened.set()
            if session.ended.is_set():  # by who went away meanwhile, perhaps before the memory was reserved
                span.start_freeing(message.session)
        span.end(session)
        return _refusal(message, *refused, span)

    def _span_of(self, model: ModelId, blocks: BlockRange) -> Span | None:
        """Return the span whose blocks these are, else the smallest that has all of them, if it takes new sessions."""
        holding = [
            span
            for key, span in self._spans.items()
            if key[0] == model and span.info.blocks.holds(blocks) and span not in self._retired
        ]
        return min(holding, key=lambda span: len(span.info.blocks), default=None)

    def _objection(self, message: Open, peer: PeerId) -> tuple[RefusalReason, str] | None:
        """Return why this node takes nothing new from a peer now, if so: a measurement makes way for all others."""
        if self.draining:
            return RefusalReason.LEAVING, "this peer is about to leave"
        sessions = (session for span in self._spans.values() for session in span.sessions.values())
        if message.background and any(not each.background or each.opened_by.peer != peer for each in sessions):
            return RefusalReason.FULL, "this peer serves others, who come before a measurement"
        if sum(each.opened_by.peer == peer for span in self.spans() for each in span.sessions.values()) >= MAX_SESSIONS:
            return RefusalReason.FULL, f"{MAX_SESSIONS} sessions of yours are open here, which is the most"
        return None

    def _reserve(self, session: StageSession) -> None:
        """Say that KV memory is about to be reserved for a session. Raises EngineFull where others come first."""
        span, peer = session.span, session.opened_by.peer
        held = span.held_pages()
        pages = span.info.kv_positions // PAGE_POSITIONS
        wanted = pages_of(session.positions)
        own = self.link_pool.peer_id
        if not may_take(peer, wanted, own=own, pages=pages, held=held, waiting=span.wanted_pages(peer)):
            raise EngineFull(
                f"no KV memory for {session.positions} positions: sessions of {peer} hold "
                f"{held.get(peer, 0) * PAGE_POSITIONS} of {span.info.kv_positions} on this span, the rest is held by, "
                "or reserved for, others"
            )
        session.reserved_positions = session.positions

    def _former(self, message: Open, link: InboundLink) -> StageSession | None:
        """Return the session that a new one continues, if it is here, its coordinator's, alike, and large enough."""
        for span in self._spans.values():
            former = span.sessions.get(message.continues) if message.continues else None
            if former is not None and former.opened_by is link and former.opened.is_set():
                is_alike = (span.info.model, former.info.blocks) == (message.model, message.blocks)
                return former if is_alike and former.positions >= message.positions else None
        return None

    def add_history(self, message: TokenHistory, link: InboundLink) -> None:
        """Take tokens so far of a session that this link opened and that has not begun."""
        for span in self._spans.values():
            session = span.sessions.get(message.session)
            if session and session.opened_by is link and session.method is None:
                if fault := session.tell_history(message.tokens):
                    span.fail(session, FailureReason.ENGINE, fault)
                return

    async def begin(self, message: Begin, link: InboundLink) -> None:
        """Begin a session that this link opened with what the votes came to, once that was seen to be so."""
        for span in self._spans.values():
            session = span.sessions.get(message.session)
            if session and session.opened_by is link and session.method is None:
                break
        else:
            return  # lost meanwhile, which was said
        if fault := _tally_fault(session, message, self.link_pool.peer_id):
            span.fail(session, FailureReason.TALLY, fault)
            return
        if session.needs_history and session.known <= message.start:
            why = f"draws depend on the tokens so far, of which {session.known} were told and {message.start} are held"
            span.fail(session, FailureReason.ENGINE, why)
            return
        method = parse_method(message.method)
        if session.calculated_by is None:
            try:
                session.computed = await span.engine.begin(session.id, session.options(method))
            except EngineError as error:
                span.fail(session, FailureReason.ENGINE, str(error))
                return
            session.calculated_by = method
            session.kept.drop(session.computed)
        if not session.ended.is_set() and (fault := _start_fault(session, message, method)):
            span.fail(session, FailureReason.ENGINE, fault)
            return
        drafter = await self._drafter(session, method)
        if session.ended.is_set():
            if drafter is not None:
                drafter.close()
            span.start_freeing(session.id)
        else:
            session.begin(message, method, drafter)
            span.send_again(session, method, message.start)
            if self.draining:
                self._ask_to_leave(session)

    def progress(self, session: SessionId, link: InboundLink) -> Progress:
        """Return how far a session that this link opened has come; nowhere where there is none."""
        for span in self._spans.values():
            found = span.sessions.get(session)
            if found is not None and found.opened_by is link:
                return found.progress()
        return Progress(session=session, received=0, computed=0, sent=0)

    async def _drafter(self, session: StageSession, method: Method) -> Drafter | None:
        """Return what guesses for a session, on a first stage; nobody does where a draft model has gone meanwhile."""
        if not session.info.is_first or method.drafter == "off":
            return None
        if method.drafter == "ngram":
            return PromptLookup()
        model = self._drafts.get(session.info.model)
        if model is None:
            return None
        return await model.open(session.id, session.positions, session.info.vocabulary_size, session.prefix)

    def hand_over(self) -> None:
        """Ask the coordinators of all sessions, but for our own, to go on elsewhere: this node is about to leave."""
        for span in self._spans.values():
            for session in span.sessions.values():
                self._ask_to_leave(session)

    def _ask_to_leave(self, session: StageSession) -> None:
        if session.method is not None and session.opened_by.peer != self.link_pool.peer_id:
            session.opened_by.reroute(session.id, FailureReason.LEAVING, "this peer is about to leave")

    async def close(self, session: SessionId, link: InboundLink) -> Closed:
        """Free a session that this link opened and say what it cost. An unknown one is no error."""
        for span in self._spans.values():
            found = span.sessions.get(session)
            if found and found.opened_by is link:
                await found.opened.wait()
                span.end(found)
                return self._countersigned(found)
        return Closed(session=session, statistics=SessionStatistics())

    def _countersigned(self, session: StageSession) -> Closed:
        """Return what a session cost here, signed for its coordinator, who may tell it to everybody."""
        if session.method is None:
            return Closed(session=session.id, statistics=session.statistics(), hardware=self._hardware())
        info = session.info
        observed = countersign(
            StageObservation(
                peer=self.link_pool.peer_id,
                blocks=info.blocks,
                hardware=self._hardware(),
                statistics=session.statistics(),
            ),
            job=session.id.job,
            observer=session.opened_by.peer,
            model=info.model,
            method=session.method.name,
            private_key=self._private_key,
        )
        return Closed(
            session=session.id,
            statistics=observed.statistics,
            hardware=observed.hardware,
            countersignature=observed.countersignature,
        )

    def link_broken(self, link: InboundLink) -> None:
        """Free every session that was opened over the link: nobody is left who could want its tokens."""
        for span in self._spans.values():
            for session in tuple(span.sessions.values()):
                if session.opened_by is link:
                    span.end(session)

    async def _join(self, session: StageSession, message: Open) -> None:
        """Link up with those that the session's outputs go to, before the first row: later would be too late."""
        job, stage = session.id
        following = SessionId(job, stage + 1)
        if message.downstream is not None:
            targets = {following: message.downstream}
        else:
            targets = {following: session.opened_by.peer, SessionId(job, 0): message.feedback or session.opened_by.peer}
        peer = session.opened_by.peer
        with trio.move_on_after(JOIN_LIMIT_S) as scope:
            for to, peer in targets.items():
                link = await self.link_pool.link_to(peer)
                if session.ended.is_set():
                    raise LinkBroken(peer, "the session was lost while it was opened")
                session.outputs[to] = link
                session.unwatch.append(link.watch(to, lambda lost: session.span.lost(session, lost)))
        if scope.cancelled_caught:
            raise LinkBroken(peer, f"not reached within {JOIN_LIMIT_S:.0f} s")


def _refusal(message: Open, reason: RefusalReason, why: str, span: Span | None) -> Refused:
    return Refused(session=message.session, reason=reason, message=why, load=span.load() if span else Load())


def _description_bytes(message: Open) -> int:
    """Return about what is held of a request while its session lives, beside a few KiB for the session itself."""
    names = sum(len(name) + 150 for name in message.methods)  # with their votes
    sampling = message.sampling
    numbers = 200 * len(sampling.logit_bias) + 50 * len(sampling.stop_tokens) if sampling is not None else 0
    return 8192 + names + numbers + len(message.prefix) + 400 * len(message.context)


def _start_fault(session: StageSession, message: Begin, method: Method) -> str | None:
    """Return why a session cannot start where it is to, if it cannot."""
    if session.calculated_by is not None and session.calculated_by.without_guesses != method.without_guesses:
        return f"what was calculated by {session.calculated_by.name} cannot be continued by another method"
    if message.start > session.computed:
        return f"{message.start} positions were to be held, {session.computed} are"
    if session.sampling is None and message.onward < message.start and message.onward < session.replay_from:
        return f"outputs from position {message.onward} on were to be kept, those from {session.replay_from} on are"
    return None


def _fault_of(message: Open, info: SpanInfo) -> str | None:
    """Return why a request makes no sense for a span, if it does not."""
    if message.session.stage >= MAX_STAGES:
        return f"a route has at most {MAX_STAGES} stages"
    if len(message.prefix) > message.positions // PAGE_POSITIONS * PREFIX_HASH_BYTES:
        return f"{len(message.prefix)} bytes of prefix hashes for {message.positions} positions"
    if message.positions > info.max_positions:
        return f"{message.positions} positions asked, the model allows {info.max_positions}"
    if info.is_last != (message.sampling is not None) or info.is_last != (message.downstream is None):
        return "sampling belongs to the last stage, a downstream peer to every other"
    return None


def _offered(
    message: Open, span: Span, drafts: Mapping[ModelId, DraftModel | None]
) -> tuple[list[Method], list[Method]]:
    """Return the methods asked for that the span can carry out now, and those that are being built for it.

    `drafts`: what guesses where the first blocks are; None is being loaded.
    """
    offered: list[Method] = []
    hoped_for: list[Method] = []
    divided = message.blocks != span.info.blocks
    ready = span.engine.variants()
    for name in message.methods:
        try:
            method = parse_method(name)
        except MethodError:
            continue  # of another version
        variant = Variant(method.engine, method.arithmetic)
        if method.name != name or (divided and variant.engine not in DIVISIBLE_ENGINES):
            continue
        guesses_here = method.drafter == "draft" and message.blocks.start == 0
        if guesses_here and message.model not in drafts:
            continue
        if variant in ready and not (guesses_here and drafts[message.model] is None):
            offered.append(method)
        elif variant not in span.unable:
            hoped_for.append(method)
    span.want(dict.fromkeys(Variant(method.engine, method.arithmetic) for method in hoped_for))
    return offered, hoped_for


def _why_nothing(hoped_for: Sequence[Method]) -> tuple[RefusalReason, str]:
    if hoped_for:
        return RefusalReason.NOT_READY, "no method that the job admits is ready here; what can be built is being built"
    why = "no method that the job admits can be had here: variants that cannot be built, or no draft model (--draft)"
    return RefusalReason.UNABLE, why


def _tally_fault(session: StageSession, message: Begin, peer: PeerId) -> str | None:
    """Return why a Begin does not follow from the votes, if it does not."""
    ballots = message.ballots
    stage = session.id.stage
    own = tuple(session.votes.get(name) for name in session.methods)
    if not ballots or ballots[-1].peer != session.opened_by.peer:
        return "the coordinator's own ballot is not the last"
    if stage >= len(ballots) - 1 or ballots[stage].peer != peer or ballots[stage].scores != own:
        return "the vote given here is not among the ballots as it was given"
    weights = None
    if message.statement is not None:
        if session.agreed is None or session.agreed.statement != message.statement:
            return "the votes were weighed by a statement that this peer did not stand by"
        weights = weights_of([ballot.peer for ballot in ballots], session.agreed.weights)
    try:
        agreed = tally(session.methods, [ballot.scores for ballot in ballots], weights)
    except ValueError as error:
        return str(error)
    if agreed != message.method:
        return f"the ballots come to {agreed}, not to {message.method}"
    return None
