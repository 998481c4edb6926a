"""Training runs at the lowest priority that does not starve."""

import os
import sys
import threading
from typing import cast

import pytest

from node.selection import training_worker
from selector import prediction
from selector.heuristic import CostTable
from selector.prediction import Predictor
from selector.task import TaskContext
from selector.task_buckets import Viewpoint


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux knows priorities of threads")
def test_only_the_training_thread_has_the_lowest_priority(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, int]] = []

    def train(samples: object, viewpoint: object, tables: object) -> None:
        del samples, viewpoint, tables
        seen.append((os.getpriority(os.PRIO_PROCESS, 0), os.sched_getscheduler(0)))

    monkeypatch.setattr(prediction, "train", train)
    monkeypatch.setattr(training_worker, "read_samples", lambda *_: [])
    before = os.getpriority(os.PRIO_PROCESS, 0)
    viewpoint = Viewpoint(peer="me", hardware="test", software="1", hour=1)

    thread = threading.Thread(target=training_worker._train, args=("nowhere", viewpoint, ()))
    thread.start()
    thread.join()
    assert seen == [(19, os.SCHED_OTHER)]
    assert os.getpriority(os.PRIO_PROCESS, 0) == before


def test_context_on_which_the_model_fails_has_no_predictions(capsys: pytest.CaptureFixture[str]) -> None:
    class Broken:
        def table(self, context: TaskContext, methods: object) -> CostTable:
            del context, methods
            raise ZeroDivisionError

    assert training_worker._answer(cast("Predictor", Broken()), TaskContext().values() | {"stage_facts": []}) == {}
    assert "ZeroDivisionError" in capsys.readouterr().err
