"""The workloads of trials, and those under which the swarm measures methods for its agreed table."""

import math
from dataclasses import dataclass
from typing import Any, Final

from protocol.measurements import TaskKind
from selector.task import TaskContext


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialWorkload:
    """One run of a trial: jobs that are submitted together.

    `shared_prefix_share`: part of the prompt, 0 to 1, that all of them begin with. `repetitiveness`: part of the
    prompt, 0 to 1, that repeats one phrase, which the answer then continues.
    """

    concurrency: int = 1
    prompt_tokens: int = 64
    max_tokens: int = 32
    shared_prefix_share: float = 0.0
    repetitiveness: float = 0.0
    task_kind: TaskKind = TaskKind.GENERATE

    @property
    def objective(self) -> str:
        """What its cost is where it is measured for the agreed table: of jobs at the same time their computing."""
        return "latency" if self.concurrency == 1 else "throughput"

    @property
    def task(self) -> dict[str, Any]:
        """The fields of a task context that it decides."""
        return {
            "concurrency": self.concurrency,
            "prompt_tokens": self.prompt_tokens,
            "max_tokens": self.max_tokens,
            "shared_prefix_share": self.shared_prefix_share,
            "repetitiveness": self.repetitiveness,
            "task_kind": self.task_kind.value,
            "objective": self.objective,
        }


def workload_name(workload: TrialWorkload) -> str:
    """Return the name of a workload in the agreed table."""
    return (
        f"jobs={workload.concurrency} prompt={workload.prompt_tokens} new={workload.max_tokens} "
        f"shared={workload.shared_prefix_share:.0%} repeated={workload.repetitiveness:.0%}"
    )


WORKLOADS: Final = {
    workload_name(workload): workload
    for workload in (
        TrialWorkload(prompt_tokens=64, max_tokens=32),
        TrialWorkload(prompt_tokens=512, max_tokens=8),
        TrialWorkload(prompt_tokens=192, max_tokens=32, repetitiveness=0.9),
        TrialWorkload(concurrency=4, prompt_tokens=256, max_tokens=16, shared_prefix_share=0.9),
    )
}
"""Few and different: a different method is best for each. All generate: what methods are worth for other kinds of task
is found by trials, on the nodes that serve them."""


def likest_workload(context: TaskContext) -> str:
    """Return the name of the workload most like a task: a factor of two in a size counts as a third in a share."""
    return min(WORKLOADS, key=lambda name: _distance(WORKLOADS[name], context))


def _distance(workload: TrialWorkload, context: TaskContext) -> float:
    sizes = (
        (workload.prompt_tokens, context.prompt_tokens),
        (workload.max_tokens, context.max_tokens),
        (workload.concurrency, context.concurrency),
    )
    shares = (
        (workload.shared_prefix_share, context.shared_prefix_share),
        (workload.repetitiveness, context.repetitiveness),
    )
    octaves = sum(abs(math.log2(max(1, one) / max(1, other))) for one, other in sizes)
    return octaves + 3 * sum(abs(one - other) for one, other in shares)
