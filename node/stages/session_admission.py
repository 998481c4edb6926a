"""Admission control: which sessions coordinators may open here, with which methods, and how one is opened."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import structlog
import trio

from node.engine.interface import PAGE_POSITIONS, EngineError, EngineFull, SpanInfo, Variant, parts_of, variant_of
from node.links.base_link import LinkBroken
from node.links.inbound_link import InboundLink
from node.links.link_pool import LinkPool
from node.links.outbound_link import OutboundLink
from node.stages.background_allowance import BackgroundAllowance
from node.stages.dials_for_others import DialsForOthers
from node.stages.fair_share import may_take, most_pages
from node.stages.peer_penalties import PeerPenalties
from node.stages.session import StageSession
from node.stages.span import Span, SpanTable, pages_of
from node.stages.voter import Agreement, Voter
from protocol.identity import ModelId, PeerId, SessionId, is_job_of
from protocol.limits import MAX_SESSIONS, MAX_STAGES, PREFIX_HASH_BYTES
from protocol.messages import FailureReason, Load, Open, Opened, RefusalReason, Refused
from selector.task import Method, MethodError, TaskContext, parse_method

CONNECT_LIMIT_S = 8.0
"""Timeout for reaching the receivers of a session's outputs; coordinators wait for a little longer."""

DESCRIPTION_BYTES = 32 << 20
"""Memory for the requests of all sessions, those that are being opened included: shared like KV memory."""

_logger = structlog.get_logger(__name__)


class _Refusal(Exception):
    """A session is not opened.

    `span`: whose load the answer reports; none where something else than KV memory is full. `most_positions`: see
    `Refused`.
    """

    def __init__(self, reason: RefusalReason, why: str, span: Span | None = None, *, most_positions: int = 0) -> None:
        super().__init__(why)
        self.reason = reason
        self.span = span
        self.most_positions = most_positions


class SessionAdmission:
    """Opens sessions, or refuses them with the reason."""

    def __init__(
        self,
        table: SpanTable,
        link_pool: LinkPool,
        dials: DialsForOthers,
        records: PeerPenalties,
        voter: Voter,
        agreed: Callable[[ModelId], Agreement | None],
        background: BackgroundAllowance,
    ) -> None:
        self._background = background
        self._table = table
        self._link_pool = link_pool
        self._dials = dials
        self._records = records
        self._voter = voter
        self._agreed = agreed
        self._opening_bytes: defaultdict[PeerId, int] = defaultdict(int)
        """Memory of requests that are being answered."""

    async def open(self, message: Open, link: InboundLink) -> Opened | Refused:
        """Open a session if its blocks are served here, with KV memory for it, and the next stage can be reached.

        One that continues another has its memory already. A peer that was charged for invalid rows waits.
        """
        peer = link.peer
        try:
            with self._described(message, peer):
                penalty_s = self._records.penalty_s(peer, trio.current_time())
                if penalty_s and peer != self._link_pool.peer_id:
                    await trio.sleep(penalty_s)
                opened = await self._admit(message, link)
        except _Refusal as refusal:
            self._records.refused(
                peer, refusal.reason, session=message.session, request_id=message.request_id, why=str(refusal)
            )
            load = refusal.span.load() if refusal.span else Load()
            return Refused(
                session=message.session,
                reason=refusal.reason,
                message=str(refusal),
                load=load,
                most_positions=refusal.most_positions if link.minor >= 2 else 0,
            )
        self._records.opened(peer)
        return opened

    @contextmanager
    def _described(self, message: Open, peer: PeerId) -> Iterator[None]:
        """Count the memory of a request while it is answered. Raises _Refusal where there is none."""
        size, held = _description_bytes(message), self._described_bytes()
        if not may_take(peer, size, own=self._link_pool.peer_id, pages=DESCRIPTION_BYTES, held=held):
            raise _Refusal(
                RefusalReason.FULL,
                f"no memory to describe another session: {held.get(peer, 0)} bytes are held for yours, the rest of "
                f"{DESCRIPTION_BYTES} is held, or reserved, for others",
            )
        self._opening_bytes[peer] += size
        try:
            yield
        finally:
            self._opening_bytes[peer] -= size
            if not self._opening_bytes[peer]:
                del self._opening_bytes[peer]

    def _described_bytes(self) -> Mapping[PeerId, int]:
        """Return the memory that the requests of each peer's sessions take."""
        found = defaultdict(int, self._opening_bytes)
        for session in self._table.sessions():
            if session.admitted.is_set():  # else it is counted as one that is being opened
                found[session.opened_by.peer] += session.description_bytes
        return found

    async def _admit(self, message: Open, link: InboundLink) -> Opened:
        span, former = self._continued(message, link) or (self._span_for(message, link.peer), None)
        if fault := _request_fault(message, span.info.part(message.blocks)):
            raise _Refusal(RefusalReason.INVALID, fault, span)
        if former is None:
            self._check_size(span, message, link.peer)
        return await self._open_on(span, message, link, former, _offered_methods(message, span, self._table))

    def _span_for(self, message: Open, peer: PeerId) -> Span:
        """Return the span for a new session. Raises _Refusal; a measurement yields to the sessions of other peers.

        Whether it is in the way of its own peer's jobs is for that peer to say.
        """
        span = self._table.holding(message.model, message.blocks)
        if self._table.is_draining:
            raise _Refusal(RefusalReason.LEAVING, "this peer is about to leave", span)
        sessions = list(self._table.sessions())
        if message.background and any(session.opened_by.peer != peer for session in sessions):
            raise _Refusal(RefusalReason.FULL, "this peer serves others, who come before a measurement")
        if message.background and peer != self._link_pool.peer_id and not self._background.is_left:
            raise _Refusal(RefusalReason.FULL, "this peer has computed as much for measurements as it may")
        if sum(session.opened_by.peer == peer for session in sessions) >= MAX_SESSIONS:
            raise _Refusal(RefusalReason.FULL, f"{MAX_SESSIONS} sessions of yours are open here, the maximum")
        if span is None:
            raise _Refusal(RefusalReason.NOT_SERVED, f"blocks {message.blocks} are not served here")
        return span

    async def _open_on(
        self, span: Span, message: Open, link: InboundLink, former: StageSession | None, offered: Sequence[Method]
    ) -> Opened:
        session = StageSession(message, span, link, _description_bytes(message))
        self._claim(message.session, link.peer, span)
        self._link_pool.receivers[message.session] = session
        span.add(session)
        try:
            await self._connect(session)
            if former is None or former.is_ended or not await span.carry_on(former, session):
                self._check_share(span, session)
                await session.reserve(span.engine)
            context = TaskContext.of(message.context, message.stage_facts)
            vote = await self._voter.vote(message.model, context, offered)
        except LinkBroken as broken:
            # Without the reason, which tells where somebody listens in this node's network.
            refusal = _Refusal(RefusalReason.UNREACHABLE, f"cannot reach {broken.peer}", span)
            _logger.debug("receiver of a session not reached", peer=broken.peer, reason=str(broken))
        except EngineFull as error:
            span.unmet_demand.add(link.peer, pages_of(message.positions))
            refusal = _Refusal(RefusalReason.FULL, str(error), span)
        except EngineError as error:
            refusal = _Refusal(RefusalReason.NOT_SERVED, str(error), span)
        else:
            if session.is_ended:  # the coordinator left while the engine reserved memory
                raise _Refusal(RefusalReason.INVALID, "closed while it was opened", span)
            # A session that continues one that has not begun has no more time than that one had.
            is_unbegun = former is not None and former.method is None
            opened_s = former.opened_s if former and is_unbegun else trio.current_time()
            agreed = self._agreed(message.model)
            session.on_opened(dict(vote.scores), agreed and agreed.for_task(context.task_kind), opened_s)
            return Opened(
                session=session.wire_id,
                load=span.load(),
                votes=session.votes,
                cached={str(key): positions for key, positions in session.state.cached.items()},
                policy=span.scheduler.policy.switches(),
                held=session.state.computed,
                kept_from=session.state.replay_from,
                statement=session.agreement.statement if session.agreement else None,
                table_digest=vote.learned_from.digest if vote.learned_from and link.minor >= 2 else None,
            )
        finally:
            session.admitted.set()
            if session.is_ended:  # by a coordinator that left meanwhile, perhaps before the memory was reserved
                span.start_freeing(session.id)
        span.end(session)
        raise refusal

    def _claim(self, session: SessionId, peer: PeerId, span: Span) -> None:
        """Have all sessions of a job be one coordinator's: the owner of the job id, else the first. Raises _Refusal.

        Every stage of a route learns the job id. It could open another's session first, or have this peer send rows of
        the job to others, who would believe that they come from its coordinator's sessions here.
        """
        job, receivers = session.job, self._link_pool.receivers
        if is_job_of(job, peer):
            for held_by in tuple(self._table.spans.values()):
                for other in tuple(held_by.sessions.values()):
                    if other.wire_id.job == job and other.opened_by.peer != peer:
                        held_by.fail(other, FailureReason.ENGINE, "the job id is another coordinator's")
        own = {each.wire_id for each in self._table.sessions() if each.opened_by.peer == peer}
        is_own = peer == self._link_pool.peer_id  # whose route to here receives under this job id
        if session in receivers or not (is_own or all(each in own for each in receivers if each.job == job)):
            raise _Refusal(RefusalReason.INVALID, "the session is open already, or the job is another's", span)

    def _check_size(self, span: Span, message: Open, peer: PeerId) -> None:
        """Raise _Refusal where a session needs more KV memory than a peer's session can ever have here.

        It is no unmet demand, for which memory would be set aside.
        """
        own, pages = self._link_pool.peer_id, span.info.kv_positions // PAGE_POSITIONS
        most = most_pages(peer, own=own, pages=pages) * PAGE_POSITIONS
        if message.positions > most:
            why = f"no KV memory for {message.positions} positions: a session of {peer} has at most {most} on this span"
            raise _Refusal(RefusalReason.FULL, why, span, most_positions=most)

    def _check_share(self, span: Span, session: StageSession) -> None:
        """Raise EngineFull where the KV memory that a session needs is for others."""
        peer, positions, held = session.opened_by.peer, session.request.positions, span.held_pages()
        own, pages = self._link_pool.peer_id, span.info.kv_positions // PAGE_POSITIONS
        waiting = span.unmet_demand.of_others(peer)
        if not may_take(peer, pages_of(positions), own=own, pages=pages, held=held, waiting=waiting):
            raise EngineFull(
                f"no KV memory for {positions} positions: sessions of {peer} hold {held[peer] * PAGE_POSITIONS} of "
                f"{span.info.kv_positions} on this span, the rest is held by, or reserved for, others"
            )

    def _continued(self, message: Open, link: InboundLink) -> tuple[Span, StageSession] | None:
        """Return the session that a new one continues, if it is here, its coordinator's, alike, and large enough."""
        found = self._table.find(message.continues, link)
        if found is None or not found[1].admitted.is_set():
            return None
        span, former = found
        is_alike = (span.info.model, former.info.blocks) == (message.model, message.blocks)
        return found if is_alike and former.request.positions >= message.positions else None

    async def _connect(self, session: StageSession) -> None:
        """Open links to the receivers of the session's outputs, before the first row: later would be too late."""
        following, request, opener = session.following, session.request, session.opened_by.peer
        if request.downstream is not None:
            targets = {following: request.downstream}
        else:
            targets = {following: opener, SessionId(following.job, 0): request.feedback or opener}
        broken: list[LinkBroken] = []

        async def connect(receiver: SessionId, peer: PeerId) -> None:
            try:
                session.outbox.connect(receiver, await self._link_for(session, peer))
            except LinkBroken as error:
                broken.append(error)
                nursery.cancel_scope.cancel()

        # At once: an opener that answers late takes none of the other one's time.
        async with trio.open_nursery() as nursery:
            for receiver, peer in targets.items():
                nursery.start_soon(connect, receiver, peer)
        if broken:
            raise broken[0]

    async def _link_for(self, session: StageSession, peer: PeerId) -> OutboundLink:
        """Return a link to a receiver of a session. Raises LinkBroken, also where no dial is left for its opener."""
        opener = session.opened_by.peer
        if not (self._link_pool.is_linked(peer) or self._dials.permit(peer, opener)):
            raise LinkBroken(peer, "not dialled for others now: it was not reached lately, or too many others were")
        try:
            with trio.fail_after(CONNECT_LIMIT_S):
                link = await self._link_pool.link_to(peer)
        except trio.TooSlowError:
            self._dials.timed_out(peer, opener)
            raise LinkBroken(peer, f"not reached within {CONNECT_LIMIT_S:.0f} s") from None
        except LinkBroken:
            self._dials.failed(peer)
            raise
        self._dials.reached(peer, opener)
        if session.is_ended:
            raise LinkBroken(peer, "the session was lost while it was opened")
        return link


def _description_bytes(message: Open) -> int:
    """Return about what a request takes while its session lives, beside a few KiB for the session itself."""
    names = sum(len(name) + 150 for name in message.methods)  # with their votes
    sampling = message.sampling
    values = 0
    if sampling is not None:
        values = 200 * len(sampling.logit_bias) + 50 * len(sampling.stop_tokens) + 2 * len(sampling.json_schema)
    return 8192 + names + values + len(message.prefix) + 400 * len(message.context)


def _request_fault(message: Open, info: SpanInfo) -> str | None:
    """Return why a request is not valid for a span, if it is not."""
    if message.session.stage >= MAX_STAGES:
        return f"a route has at most {MAX_STAGES} stages"
    if len(message.prefix) > message.positions // PAGE_POSITIONS * PREFIX_HASH_BYTES:
        return f"{len(message.prefix)} bytes of prefix hashes for {message.positions} positions"
    if message.positions > info.max_positions:
        return f"{message.positions} positions requested, the model allows {info.max_positions}"
    if info.is_last != (message.sampling is not None) or info.is_last != (message.downstream is None):
        return "sampling belongs to the last stage, a downstream peer to every other"
    return None


def _offered_methods(message: Open, span: Span, table: SpanTable) -> list[Method]:
    """Return the requested methods that the span can carry out now, and have those built that the job prefers to them.

    Raises _Refusal for none.
    """
    offered: list[Method] = []
    pending: list[Variant] = []
    ready = span.engine.variants()
    for name in message.methods:
        try:
            method = parse_method(name)
        except MethodError:
            continue  # of another version
        variant = variant_of(method)
        if method.name != name or not parts_of(variant.engine).include(message.blocks, span.info.blocks):
            continue
        drafts_here = method.drafter == "draft" and message.blocks.start == 0
        if drafts_here and message.model not in table.draft_models:
            continue
        if variant in ready and not (drafts_here and table.draft_models[message.model] is None):
            offered.append(method)
        elif not span.variants.is_unavailable(variant) and not offered:  # what is ready is preferred to all that follow
            pending.append(variant)
    span.variants.request(dict.fromkeys(pending))
    if offered:
        return offered
    if pending:
        why = "no method that the job admits is ready here; what can be built is being built"
        raise _Refusal(RefusalReason.NOT_READY, why, span)
    why = "no method that the job admits is available here: variants cannot be built, or no draft model (--draft)"
    raise _Refusal(RefusalReason.UNABLE, why, span)
