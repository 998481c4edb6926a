"""Scheduler and stage policy: which queued rows go into the next step of an engine. Without a clock of its own.

Three disciplines. `one`: a step holds the rows of one session. `static` batching: the sessions that wait when a batch
forms stay together until they have ended, and no other joins meanwhile. `continuous` batching: sessions join and leave
at every step (Orca, OSDI '22), with chunked prefill: a new prompt is cut so that decoding sessions wait for no more
than the step's row budget (Sarathi, OSDI '24).
"""

import enum
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Final, Generic, TypeVar

from node.stages.decode_groups import DecodeGroups
from node.util.signal import Signal
from protocol.identity import PeerId, SessionId
from protocol.limits import MAX_SLICES
from protocol.messages import Slice
from protocol.tensors import Tensor

MIN_PREFILL_ROWS: Final = 16
"""Prompt rows that a step takes however many sessions decode: else these could starve a new session."""

PREFILL_ROWS: Final = 512
"""Prompt rows of a step at most: more gains nothing, and jobs that arrive meanwhile wait for all of them. A step of
many would look like a stage that hangs."""

OVERTAKING: Final = 3
"""Rows of shorter prompts for each row of their coordinator's oldest one: so none waits for long, and none starves."""

STATIC_MAX_WAIT_S: Final = 1.0
"""How long a static batch waits for its own rows before another forms: its sessions may be stuck elsewhere."""

STALL_BOUND_S: Final = 0.25
"""What a chunk of a new prompt may add to the step of decoding sessions."""

HOLD_S: Final = 5.0
"""How long another policy must have been better before it takes effect."""

STEP_ROWS: Final = (32, 64, 128, 256, 512)
"""Row budgets to choose from."""

_SMOOTHING: Final = 0.2
_MIN_ROWS: Final = 16
"""Steps with fewer rows show little of the cost of a row."""


BACKGROUND_SHARE: Final = 0.1
"""Share of the time that measurements get while users' sessions are open.

They neither stop, which would lose what was computed, nor take turns with the users' rows, which would double the time
of each token.
"""

MAX_PAUSE_S: Final = 15.0
"""How long measurements pause after a step, at most: a pause must not look like a stage that hangs."""


class Batching(enum.StrEnum):
    """How sessions share the steps of an engine."""

    ONE = "one"
    STATIC = "static"
    CONTINUOUS = "continuous"


@dataclass(frozen=True, slots=True)
class StagePolicy:
    """What a stage does for all its sessions. `step_rows`: the row budget of a step in which some decode."""

    batching: Batching = Batching.CONTINUOUS
    step_rows: int = 128

    def switches(self) -> dict[str, str]:
        """Return it as the switches of a method's stage policy."""
        return {"batching": self.batching.value, "step_rows": str(self.step_rows)}


L = TypeVar("L")


@dataclass(frozen=True, slots=True)
class Work(Generic[L]):
    """Rows that wait for the engine.

    `part.session` is the session's id here. `coordinator`: whose job they belong to. `origin`: where their credit is
    returned; `payload_bytes`: how much that is, which need not be the tensor's size. `received_s`: when they arrived;
    `arrived_s`: when they could be queued, with their drafts. `held_rows`: rows as they arrived, whose memory is free
    once these are computed. `is_scored`: whether tokens of the prompt behind them are scored. `is_background`: whether
    they are of a measurement, for which no user waits. `stages`: how many the session's route has.
    """

    part: Slice
    tensor: Tensor
    coordinator: PeerId
    origin: L
    payload_bytes: int
    arrived_s: float
    received_s: float = 0.0
    held_rows: int = 0
    is_scored: bool = False
    is_background: bool = False
    stages: int = 1

    @property
    def session(self) -> SessionId:
        """The session of the rows."""
        return self.part.session

    @property
    def rows(self) -> int:
        """The number of rows."""
        return self.part.rows

    @property
    def is_prefill(self) -> bool:
        """Whether some of the rows draw nothing: part of a prompt."""
        return self.part.rows > self.part.draws

    def cut(self, rows: int) -> "tuple[Work[L], Work[L]]":
        """Return the first `rows` rows, which draw nothing, and the rest."""
        part = self.part
        before = replace(part, rows=rows, draws=0, drafts=())
        after = replace(part, position=part.position + rows, rows=part.rows - rows)
        share = self.payload_bytes * rows // part.rows
        return (
            replace(self, part=before, tensor=self.tensor.cut(0, rows), payload_bytes=share, held_rows=0),
            replace(
                self, part=after, tensor=self.tensor.cut(rows, part.rows), payload_bytes=self.payload_bytes - share
            ),
        )


class Scheduler(Generic[L]):
    """The rows that wait for one engine. Rows of one session keep their order."""

    def __init__(self, policy: StagePolicy | None = None) -> None:
        self.policy = policy or StagePolicy()
        self.changed = Signal()
        """Set when there may be rows for another step."""
        self._waiting: dict[SessionId, deque[Work[L]]] = {}
        self._held: set[SessionId] = set()
        self._decoding: set[SessionId] = set()
        self._members: set[SessionId] = set()
        self._member_step_s = 0.0
        self._served: dict[PeerId, int] = {}
        """Prompt rows that each coordinator got,"""
        self._overtaking: dict[PeerId, int] = {}
        """and those that its shorter prompts got beyond their share while its oldest one waited."""
        self._users: set[SessionId] = set()
        """Sessions that somebody waits for."""
        self._groups = DecodeGroups()
        self._has_stepped = False
        """Whether the last call for a step returned one."""
        self._waits_until_s: float | None = None
        """Until when decoding rows wait for those of other sessions, while they do."""
        self._background_began_s: float | None = None
        """When the last step began, if it has rows of a measurement."""
        self._background_from_s = 0.0
        """When the next step with such rows may begin while there are users."""

    @property
    def rows(self) -> int:
        """Rows that wait."""
        return sum(work.rows for queue in self._waiting.values() for work in queue)

    def add(self, work: Work[L]) -> None:
        """Queue rows."""
        if not work.is_background:
            self._users.add(work.session)
        queue = self._waiting.setdefault(work.session, deque())
        while work.is_scored and work.rows - work.part.draws > PREFILL_ROWS:
            piece, work = work.cut(PREFILL_ROWS)
            queue.append(piece)
        queue.append(work)
        if not work.is_prefill:
            self._groups.arrived(work.session, work.arrived_s)
        # A new coordinator starts level with the one served least, without a claim on what was served before.
        self._served.setdefault(work.coordinator, min(self._served.values(), default=0))
        self.changed.set()

    def put_back(self, work: Work[L]) -> None:
        """Queue rows again that a step has left out, before the others of their session."""
        self._waiting.setdefault(work.session, deque()).appendleft(work)
        self._served.setdefault(work.coordinator, min(self._served.values(), default=0))
        self.changed.set()

    def hold(self, session: SessionId) -> None:
        """Take no rows of a session until it is released: its outputs have nowhere to go."""
        self._held.add(session)

    def release(self, session: SessionId) -> None:
        """Take rows of a session again."""
        self._held.discard(session)
        self.changed.set()

    def remove(self, session: SessionId) -> None:
        """Forget a session that has ended, and what waits of it."""
        self._waiting.pop(session, None)
        self._held.discard(session)
        self._decoding.discard(session)
        self._members.discard(session)
        self._users.discard(session)
        self._groups.remove(session)
        self.changed.set()  # a static batch may be over with it, or measurements have the engine for themselves

    def next_batch(self, now_s: float) -> list[Work[L]]:
        """Remove and return the rows of the next step, at most MAX_SLICES slices; none if no session may go yet.

        Call it when the step before is over.
        """
        if self._background_began_s is not None:
            took_s, self._background_began_s = now_s - self._background_began_s, None
            self._background_from_s = now_s + min(took_s * (1 / BACKGROUND_SHARE - 1), MAX_PAUSE_S)
        heads = sorted(self._heads(now_s), key=lambda work: work.arrived_s)
        match self.policy.batching:
            case Batching.ONE:
                chosen = heads[:1]
            case Batching.STATIC:
                chosen = self._static(heads, now_s)
            case Batching.CONTINUOUS if self._waits(heads, now_s):
                chosen = []
            case Batching.CONTINUOUS:
                chosen = self._continuous(heads)
        for work in chosen:
            queue = self._waiting[work.session]
            queue.popleft()
            if not queue:
                del self._waiting[work.session]
            if work.part.draws:
                self._decoding.add(work.session)
            if work.is_background:
                self._background_began_s = now_s
        self._has_stepped = bool(chosen)
        waiting = {queue[0].coordinator for queue in self._waiting.values()}
        self._served = {peer: rows for peer, rows in self._served.items() if peer in waiting}
        self._overtaking = {peer: rows for peer, rows in self._overtaking.items() if peer in waiting}
        return chosen

    def on_computed(self, batch: Iterable[Work[L]], took_s: float, now_s: float, *, is_whole: bool = True) -> None:
        """Record that a step for these rows has ended. `is_whole`: whether it had no others, which got no output."""
        drawing = [work for work in batch if work.session in self._decoding]  # not those that have ended meanwhile
        for work in drawing:
            self._groups.decoded(work.session, work.stages, now_s)
        if is_whole and drawing and not any(work.is_prefill for work in batch):
            self._groups.observe(len(drawing), took_s)

    def next_chance_s(self, now_s: float) -> float | None:
        """Return when waiting rows may go without new ones arriving; None if that is not foreseen."""
        if self.policy.batching is Batching.STATIC and any(True for _ in self._heads(now_s)):
            return max(now_s, self._member_step_s + STATIC_MAX_WAIT_S)
        if self._waits_until_s is not None:
            return self._waits_until_s
        if self._waiting and self._is_paced(now_s):
            return self._background_from_s
        return None

    def _is_paced(self, now_s: float) -> bool:
        """Return whether measurements have had their share of the time for now."""
        return bool(self._users) and now_s < self._background_from_s

    def _heads(self, now_s: float) -> Iterable[Work[L]]:
        """Return the first rows of each session that may go."""
        is_paced = self._is_paced(now_s)
        heads = (queue[0] for session, queue in self._waiting.items() if session not in self._held)
        return (work for work in heads if not (is_paced and work.is_background))

    def _static(self, heads: list[Work[L]], now_s: float) -> list[Work[L]]:
        ready = [work for work in heads if work.session in self._members]
        if not ready and (not self._members or now_s >= self._member_step_s + STATIC_MAX_WAIT_S):
            ready = heads
            self._members = {work.session for work in heads[:MAX_SLICES]}
        if ready:
            self._member_step_s = now_s
        return ready[:MAX_SLICES]

    def _waits(self, heads: list[Work[L]], now_s: float) -> bool:
        """Return whether a step for decoding sessions waits for others that are about to be back."""
        until_s, self._waits_until_s = self._waits_until_s, None
        if not heads or len(heads) >= self._groups.size() or any(work.is_prefill for work in heads):
            return False
        if until_s is None:
            if not self._has_stepped:
                return False  # the engine was idle: there is time for a step of their own
            until_s = now_s + self._groups.worth_waiting_s()
        if now_s >= until_s or not self._groups.is_expected(now_s, until_s):
            return False
        self._waits_until_s = until_s
        return True

    def _continuous(self, heads: list[Work[L]]) -> list[Work[L]]:
        step_rows = self.policy.step_rows
        chosen: list[Work[L]] = []
        rows = 0
        prompts = [work for work in heads if work.is_prefill]
        # Each step that computes a part of a prompt takes long: all that decode share it.
        most = MAX_SLICES if prompts else self._groups.size()
        for work in heads:
            if not work.is_prefill and len(chosen) < most and (not chosen or rows + work.rows <= step_rows):
                chosen.append(work)
                rows += work.rows
        budget = max(MIN_PREFILL_ROWS, step_rows - rows)
        taken = 0
        oldest = {work.coordinator: work for work in reversed(prompts)}
        for work in self._fairly(prompts, oldest, budget):
            # Decoding sessions may be at another stage just now: their rows will arrive here soon. A measurement's
            # prompt is cut as for them in any case: a user who comes must not wait long.
            bounded = work.is_background or bool(self._decoding & self._users - {work.session})
            room = (budget if bounded else PREFILL_ROWS) - taken
            if room <= 0 or len(chosen) == MAX_SLICES:
                break
            piece = self._cut(work, room)
            if piece is None:
                break
            chosen.append(piece)
            taken += piece.rows
            self._served[work.coordinator] += piece.rows
            ahead = self._overtaking.get(work.coordinator, 0)
            ahead += -OVERTAKING * piece.rows if work is oldest[work.coordinator] else piece.rows
            self._overtaking[work.coordinator] = max(0, ahead)
        return chosen

    def _fairly(self, prompts: list[Work[L]], oldest: Mapping[PeerId, Work[L]], step_rows: int) -> Iterable[Work[L]]:
        """Yield prompts of the coordinator served least so far: many jobs give no claim to more.

        Of its own those with the fewest rows left come first, which makes the mean wait the shortest: a short prompt
        waits for no long one, and of two long ones the first is not delayed. The oldest one comes first once the others
        have had their share.
        """
        queues = {work.coordinator: deque[Work[L]]() for work in prompts}
        for work in sorted(prompts, key=lambda each: sum(piece.rows for piece in self._waiting[each.session])):
            queues[work.coordinator].append(work)
        for peer, work in oldest.items():
            if self._overtaking.get(peer, 0) >= OVERTAKING * step_rows:
                queues[peer].remove(work)
                queues[peer].appendleft(work)
        while queues:
            peer = min(queues, key=lambda each: self._served.get(each, 0))
            yield queues[peer].popleft()
            if not queues[peer]:
                del queues[peer]

    def _cut(self, work: Work[L], room: int) -> Work[L] | None:
        """Return as many rows of a prompt as there is room for, and leave the others where they are."""
        if work.rows <= room:
            return work
        rows = min(room, work.rows - max(1, work.part.draws))
        if rows < 1:
            return None
        before, after = work.cut(rows)
        queue = self._waiting[work.session]
        queue[0] = after
        queue.appendleft(before)
        return before


class PolicyController:
    """Fits the row budget to the measured cost of rows, slowly, as changes disturb sessions; a fixed one stays."""

    def __init__(self, *, batching: Batching | None = None, step_rows: int | None = None) -> None:
        self._fixed_step_rows = step_rows
        self.policy = StagePolicy(batching or Batching.CONTINUOUS, step_rows or StagePolicy().step_rows)
        self._row_s = 0.0
        self._better: int | None = None
        self._better_since_s = 0.0

    def observe(self, rows: int, compute_s: float, now_s: float) -> StagePolicy:
        """Record a step, and return the policy for the next."""
        if rows >= _MIN_ROWS:
            row_s = compute_s / rows
            self._row_s = row_s if not self._row_s else self._row_s + _SMOOTHING * (row_s - self._row_s)
        if self._row_s and self._fixed_step_rows is None:
            fitting = max((rows for rows in STEP_ROWS if rows * self._row_s <= STALL_BOUND_S), default=STEP_ROWS[0])
            self._settle(fitting, now_s)
        return self.policy

    def _settle(self, step_rows: int, now_s: float) -> None:
        if step_rows == self.policy.step_rows:
            self._better = None
        elif step_rows != self._better:
            self._better, self._better_since_s = step_rows, now_s
        elif now_s - self._better_since_s >= HOLD_S:
            self.policy = StagePolicy(self.policy.batching, step_rows)
            self._better = None
