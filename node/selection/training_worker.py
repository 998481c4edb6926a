"""The training process: `python -m node.selection.training_worker`, started by `learner.py`.

Lines of JSON: it reads the database and the viewpoint, trains at the lowest priority, and writes the result; then it
answers each context with the predictions for every method, until its standard input ends. The trained model is written
to an unlinked file of the node, whose descriptor is the argument, and a later process takes it from there (`load`): no
model is ever loaded that this node has not trained.
"""

import json
import os
import pickle
import resource
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Final

from node.selection.agreed_tables import load_table
from node.selection.samples import read_samples
from node.util.priority import LOWEST, set_session_nice
from protocol.measurements import TaskKind
from protocol.schema import from_map
from protocol.stage_facts import StageFacts
from selector.evidence import AgreedTable
from selector.task import PackageFormat, TaskContext, portfolio
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
    file = os.fdopen(int(sys.argv[1]), "r+b")
    request = json.loads(sys.stdin.readline())
    predictor, result = (_load(file), {}) if "load" in request else _train_and_keep(request, file)
    out.write(json.dumps(result) + "\n")
    if predictor is None:
        return
    for line in sys.stdin:
        out.write(json.dumps(_answer(predictor, json.loads(line))) + "\n")


def _train_and_keep(request: dict[str, Any], file: IO[bytes]) -> tuple["Predictor | None", dict[str, Any]]:
    """Return the trained predictor, which is also in the file then, and how it went."""
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
        return None, {"samples": 0}
    return predictor, {
        "kept": _keep(predictor, file),
        "samples": predictor.sample_count,
        "share": predictor.share,
        "learned_from": {model: sorted(hardware) for model, hardware in predictor.learned_from.items()},
        "seconds": time.monotonic() - began_s,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def _keep(predictor: "Predictor", file: IO[bytes]) -> bool:
    """Write the predictor to the file; return whether there was room for it."""
    try:
        pickle.dump(predictor, file, protocol=pickle.HIGHEST_PROTOCOL)
        file.flush()
    except OSError:
        return False
    return True


def _load(file: IO[bytes]) -> "Predictor":
    """Return the predictor in the file, which only a process of this node has written."""
    file.seek(0)
    predictor: Predictor = pickle.load(file)  # noqa: S301
    return predictor


def _answer(predictor: "Predictor", values: dict[str, Any]) -> dict[str, tuple[float, float]]:
    """Return the predictions by method; none for a context that they fail on, which must not end the process."""
    try:
        return _predict(predictor, values)
    except Exception:  # noqa: BLE001  # contexts are peers'
        traceback.print_exc()
        return {}


def _predict(predictor: "Predictor", values: dict[str, Any]) -> dict[str, tuple[float, float]]:
    facts = [from_map(StageFacts, each, "stage facts") for each in values.pop("stage_facts")]
    context = TaskContext.of(values, facts)
    methods = [each for known in PackageFormat for each in portfolio(known, kind=TaskKind(context.task_kind))]
    table = predictor.table(context, methods)
    return {name: (each.log_cost, each.deviation) for name, each in table.items()}


def _train(database: str, viewpoint: Viewpoint, tables: Sequence[AgreedTable]) -> "Predictor | None":
    """Train in this thread, at a 68th of the CPU share of a normal thread.

    With SCHED_IDLE it would be a 340th, and training would starve where jobs keep the processors busy.
    """
    if sys.platform == "linux":  # elsewhere priorities are per process, and answers must be fast
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, 0, LOWEST)
    from selector.prediction import train  # the import takes as long as training on a short history

    members = {model: viewpoint.members(model) for model in viewpoint.trust}
    return train([*read_samples(Path(database), viewpoint.peer, members)], viewpoint, tables)


if __name__ == "__main__":
    main()
