"""What this node expects methods to cost: tables by the hand-written rule, or by the model once there is one.

A table holds for all tasks that are much alike, and is kept until the next model. Whoever asks waits a bounded time at
most: a prediction is made in another process, and where it is late the rule is asked instead.
"""

from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import trio

from selector.expectation import RULE_DEVIATION, Expectation, Table, rule_table
from selector.heuristic import predicted_cost
from selector.task import PORTFOLIO, Method, TaskContext
from selector.task_buckets import representative

MISS_LIMIT_S: Final = 0.1
"""How long a choice between methods waits for a prediction that was never made before."""

MAX_TABLES: Final = 4096
"""Tables that are kept, the latest used."""

MAX_ASKED: Final = 64
"""Predictions that may be under way or in line."""


@dataclass(frozen=True, slots=True)
class Opinion:
    """What each method is expected to cost in a context.

    `experiences`: measurements that the model behind it was trained on; 0 where it is the rule's alone.
    """

    table: Table
    experiences: int

    @property
    def basis(self) -> str:
        """What it goes by."""
        return "model" if self.experiences else "rule"


Ask = Callable[[TaskContext], Awaitable[Mapping[str, tuple[float, float]]]]
"""Predicts for a context: of each method of the portfolio logarithm of cost and deviation. Raises OSError."""


class Predictions:
    """Tables by context, made when first asked for."""

    def __init__(self) -> None:
        self._ask: Ask | None = None
        self._experiences = 0
        self._tables: OrderedDict[TaskContext, Table] = OrderedDict()
        self._pending: dict[TaskContext, trio.Event] = {}
        self._asked_in, self._asked = trio.open_memory_channel[TaskContext](MAX_ASKED)
        self.hits = 0
        self.misses = 0
        self.late = 0
        """Choices by the rule because the prediction was not there in time."""

    def renew(self, ask: Ask | None, experiences: int) -> None:
        """Go by another model from now on; `ask` predicts for a representative context."""
        self._ask = ask
        self._experiences = experiences
        self._tables.clear()

    @property
    def experiences(self) -> int:
        """What the model was trained on; 0 without one."""
        return self._experiences

    async def of(self, context: TaskContext, methods: Sequence[Method]) -> Opinion:
        """Return what some methods are expected to cost, after a bounded wait at most."""
        like = representative(context)
        # Where there is nothing to choose nobody waits: a text that goes on after a loss has its method already.
        table = await self._table(like, MISS_LIMIT_S if len(methods) > 1 else 0.0) if self._ask else None
        if table is None:
            return Opinion(rule_table(context, methods), 0)
        # What a job is expected to cost goes by its own size; how methods differ by that of its like.
        shift = {name: cost.log_cost - predicted_cost(like, PORTFOLIO[name]) for name, cost in table.items()}
        found: dict[str, Expectation] = {}
        for method in methods:
            name = method.name
            deviation = table[name].deviation if name in table else RULE_DEVIATION
            found[name] = Expectation(predicted_cost(context, method) + shift.get(name, 0.0), deviation)
        return Opinion(found, self._experiences)

    async def _table(self, like: TaskContext, limit_s: float) -> Table | None:
        if like in self._tables:
            self.hits += 1
            self._tables.move_to_end(like)
            return self._tables[like]
        self.misses += 1
        event = self._pending.get(like)
        if event is None:
            event = trio.Event()
            try:
                self._asked_in.send_nowait(like)
            except trio.WouldBlock:
                self.late += 1
                return None
            self._pending[like] = event
        with trio.move_on_after(limit_s):
            await event.wait()
        if like not in self._tables:
            self.late += 1
        return self._tables.get(like)

    async def run(self) -> None:
        """Have what is asked for predicted, one at a time, until cancelled."""
        async for like in self._asked:
            ask, experiences = self._ask, self._experiences
            try:
                if ask is not None:
                    said = await ask(like)
                    if ask == self._ask and experiences == self._experiences:
                        self._tables[like] = {name: Expectation(*pair) for name, pair in said.items()}
            except OSError:
                if ask == self._ask:  # else it is one that was replaced meanwhile, and stopped
                    self.renew(None, 0)
            finally:
                self._pending.pop(like).set()
            while len(self._tables) > MAX_TABLES:
                self._tables.popitem(last=False)
