"""The training process: `python -m node.selection.training_worker`, started by `learner.py`.

Lines of JSON: it reads the database and the viewpoint, trains at the lowest priority, and writes the result; then it
answers each context with the predictions for every method, until its standard input ends. The trained model never
leaves the process that made it, and no other model is ever loaded.
"""

import json
import os
import resource
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from node.selection.agreed_tables import load_table
from node.selection.samples import read_samples
from node.util.priority import LOWEST, set_session_nice
from protocol.schema import from_map
from protocol.stage_facts import StageFacts
from selector.evidence import AgreedTable
from selector.task import PORTFOLIO, TaskContext
from selector.task_buckets import Viewpoint

if TYPE_CHECKING:
    from selector.prediction import Predictor

MAX_MEMORY_BYTES: Final = 2 << 30
"""Of the whole process; beyond it the training fails."""


def main() -> None:
    """Train, then answer until standard input ends."""
    out = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # keeps libraries that print out of the answers
    resource.setrlimit(resource.RLIMIT_DATA, (MAX_MEMORY_BYTES, resource.RLIM_INFINITY))
    request = json.loads(sys.stdin.readline())
    viewpoint = Viewpoint(**request["viewpoint"])
    began_s = time.monotonic()
    found: list[Predictor | None] = []
    # Linux has a priority per thread, so that this one's later answers are not slowed down.
    tables = [load_table(values) for values in request["tables"]]
    trainer = threading.Thread(target=lambda: found.append(_train(request["database"], viewpoint, tables)))
    set_session_nice(LOWEST)
    trainer.start()
    trainer.join()
    set_session_nice(0)
    predictor = found[0] if found else None
    if predictor is None:
        out.write(json.dumps({"samples": 0}) + "\n")
        return
    result = {
        "samples": predictor.sample_count,
        "share": predictor.share,
        "learned_from": sorted(predictor.learned_from),
        "seconds": time.monotonic() - began_s,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    out.write(json.dumps(result) + "\n")
    for line in sys.stdin:
        out.write(json.dumps(_answer(predictor, json.loads(line))) + "\n")


def _answer(predictor: "Predictor", values: dict[str, Any]) -> dict[str, tuple[float, float]]:
    facts = [from_map(StageFacts, each, "stage facts") for each in values.pop("stage_facts")]
    table = predictor.table(TaskContext.of(values, facts), tuple(PORTFOLIO.values()))
    return {name: (each.log_cost, each.deviation) for name, each in table.items()}


def _train(database: str, viewpoint: Viewpoint, tables: Sequence[AgreedTable]) -> "Predictor | None":
    """Train in this thread, at a 68th of the CPU share of a normal thread.

    With SCHED_IDLE it would be a 340th, and training would starve where jobs keep the processors busy.
    """
    if sys.platform == "linux":  # elsewhere priorities are per process, and answers must be fast
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, 0, LOWEST)
    from selector.prediction import train  # the import takes as long as training on a short history

    return train(list(read_samples(Path(database))), viewpoint, tables)


if __name__ == "__main__":
    main()
