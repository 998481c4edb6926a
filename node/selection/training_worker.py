"""The process that learns: `python -m node.selection.training_worker`, started by `learner.py`.

It reads one line of JSON that says from which history to learn, and for whom; trains, at the lowest priority; says in
one line what came of it; then answers a line with a context by a line with a prediction for every method, until its
standard input ends. So the trained model never leaves the process that made it, and nobody else's is ever loaded.
"""

import json
import math
import os
import resource
import sqlite3
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import quote

from node.coordinator.observation import software_name
from node.util.priority import LOWEST, set_session_nice
from protocol.errors import RemoteProtocolError
from protocol.measurements import Observation
from protocol.observations import bucket_of, read_observation
from selector.task import PORTFOLIO, TaskContext
from selector.task_buckets import Viewpoint
from selector.training_set import MAX_EXPERIENCES, Experience

if TYPE_CHECKING:
    from selector.prediction import Predictor

MAX_MEMORY_BYTES: Final = 2 << 30
"""Of the whole process; what would take more fails, and the node goes on with what it has."""


def main() -> None:
    """Train, then answer until standard input ends."""
    out = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # a library that prints does not spoil the answers
    resource.setrlimit(resource.RLIMIT_DATA, (MAX_MEMORY_BYTES, resource.RLIM_INFINITY))
    asked = json.loads(sys.stdin.readline())
    viewpoint = Viewpoint(**asked["viewpoint"])
    began_s = time.monotonic()
    found: list[Predictor | None] = []
    # Linux knows priorities of threads: this one's answers later are not held up by what it did before.
    trainer = threading.Thread(target=lambda: found.append(_train(asked["database"], viewpoint)))
    set_session_nice(LOWEST)
    trainer.start()
    trainer.join()
    set_session_nice(0)
    predictor = found[0] if found else None
    if predictor is None:
        out.write(json.dumps({"experiences": 0}) + "\n")
        return
    said = {
        "experiences": predictor.experiences,
        "share": predictor.share,
        "seconds": time.monotonic() - began_s,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    out.write(json.dumps(said) + "\n")
    for line in sys.stdin:
        out.write(json.dumps(_answer(predictor, json.loads(line))) + "\n")


def _answer(predictor: "Predictor", values: dict[str, Any]) -> dict[str, tuple[float, float]]:
    table = predictor.table(TaskContext.of(values), tuple(PORTFOLIO.values()))
    return {name: (each.log_cost, each.deviation) for name, each in table.items()}


def _train(database: str, viewpoint: Viewpoint) -> "Predictor | None":
    """Learn in this thread, which gets a 68th of what of a processor another thread gets, and what nobody else wants.

    With SCHED_IDLE it would be a 340th: where jobs always fill the processors nothing would ever be learned.
    """
    if sys.platform == "linux":  # elsewhere priorities are processes', and the answers must not wait
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, 0, LOWEST)
    from selector.prediction import train  # what it imports takes as long as learning from a short history

    return train(list(read_experiences(Path(database))), viewpoint)


def read_experiences(database: Path) -> Iterator[Experience]:
    """Yield the newest observations of a history that can be learned from; what cannot be read is left out."""
    query = "SELECT envelope FROM observations ORDER BY bucket DESC, id LIMIT ?"
    with closing(sqlite3.connect(f"file:{quote(str(database))}?mode=ro", uri=True)) as connection:
        for (envelope,) in connection.execute(query, (MAX_EXPERIENCES,)):
            try:
                observation = read_observation(envelope).observation
            except RemoteProtocolError:
                continue
            if (experience := experience_of(observation)) is not None:
                yield experience


def experience_of(observation: Observation) -> Experience | None:
    """Return what an observation teaches; None for a job that was replayed, or that did not cover the whole model."""
    workload, model, measured = observation.workload, observation.model, observation.measurements
    route = observation.route
    if measured.replays or route[0].blocks.start != 0 or route[-1].blocks.end != model.block_count:
        return None
    context = TaskContext.from_parts(
        model,
        workload,
        max_tokens=workload.completion_tokens,
        stage_count=len(route),
        hardware="+".join(stage.hardware for stage in route),
    )
    return Experience(
        context=context,
        method=observation.method.name,
        log_cost=math.log(measured.total_s),
        log_ratio=measured.log_ratio_to_baseline,
        observer=observation.observer,
        route="/".join(f"{stage.peer}:{stage.blocks}" for stage in route),
        hour=bucket_of(observation.issued_at_s),
        software=software_name(observation.software),
        vouched=observation.is_countersigned,
    )


if __name__ == "__main__":
    main()
