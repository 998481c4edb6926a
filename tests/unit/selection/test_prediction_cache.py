"""PredictionCache come from the latest model, and one that breaks does not take another with it."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from node.selection.learner import MAX_AGE_S, Learner
from node.selection.prediction_cache import PredictionCache
from protocol.stage_facts import DeviceKind, StageFacts
from selector.task import PORTFOLIO, TaskContext
from selector.task_buckets import Viewpoint

CONTEXT = TaskContext(architecture="fake", block_count=9, hidden_size=32, hardware="test")
METHODS = tuple(PORTFOLIO.values())


class Worker:
    stopped = False

    async def stop(self) -> None:
        await trio.lowlevel.checkpoint()
        self.stopped = True

    async def unload_if_idle(self) -> None:
        await trio.lowlevel.checkpoint()


async def sure(context: TaskContext) -> Mapping[str, tuple[float, float]]:
    del context
    await trio.lowlevel.checkpoint()
    return {each.name: (0.0, 0.1) for each in METHODS}


async def broken(context: TaskContext) -> Mapping[str, tuple[float, float]]:
    del context
    await trio.lowlevel.checkpoint()
    raise OSError("the worker ended")


async def test_worker_stopped_during_a_request_leaves_its_successor(
    nursery: trio.Nursery, virtual_clock: MockClock
) -> None:
    predictions = PredictionCache()
    asked, stopped = trio.Event(), trio.Event()

    async def old(context: TaskContext) -> Mapping[str, tuple[float, float]]:
        asked.set()
        await stopped.wait()
        return await broken(context)

    predictions.set_predictor(old, 10)
    nursery.start_soon(predictions.run)
    nursery.start_soon(predictions.predict, CONTEXT, METHODS)
    await asked.wait()
    predictions.set_predictor(sure, 20)
    stopped.set()
    await trio.testing.wait_all_tasks_blocked()
    assert predictions.sample_count == 20
    assert (await predictions.predict(CONTEXT, METHODS)).basis == "model"


async def test_failed_worker_is_replaced_without_growth_of_the_history(
    nursery: trio.Nursery, virtual_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    predictions = PredictionCache()
    workers: list[Worker] = []

    async def train(learner: Learner, nursery: trio.Nursery, tables: object) -> Worker:
        del learner, nursery, tables
        await trio.sleep(1)
        workers.append(Worker())
        predictions.set_predictor(sure if len(workers) > 1 else broken, 10)
        return workers[-1]

    async def count() -> int:
        await trio.lowlevel.checkpoint()
        return 10

    monkeypatch.setattr(Learner, "_train", train)
    viewpoint = Viewpoint(peer="me", hardware="test", software="1", hour=1)
    learner = Learner(Path("nowhere"), predictions, count=count, viewpoint=lambda: viewpoint)
    nursery.start_soon(learner.run)
    await trio.sleep(100)
    assert len(workers) == 1
    assert (await predictions.predict(CONTEXT, METHODS)).basis == "rule"
    await trio.sleep(100)
    assert [worker.stopped for worker in workers] == [True, False]
    assert (await predictions.predict(CONTEXT, METHODS)).basis == "model"
    await trio.sleep(MAX_AGE_S)  # what was learned from may have left the history meanwhile
    assert [worker.stopped for worker in workers] == [True, True, False]


async def test_single_method_does_not_wait_for_a_prediction(nursery: trio.Nursery, virtual_clock: MockClock) -> None:
    async def slow(context: TaskContext) -> Mapping[str, tuple[float, float]]:
        await trio.sleep(0.05)
        return await sure(context)

    predictions = PredictionCache()
    predictions.set_predictor(slow, 10)
    nursery.start_soon(predictions.run)
    asked_s = trio.current_time()
    assert list((await predictions.predict(CONTEXT, METHODS[:1])).table) == [METHODS[0].name]
    assert trio.current_time() == asked_s
    assert (await predictions.predict(CONTEXT, METHODS)).basis == "model"


async def test_heuristic_judges_a_context_without_predictions(nursery: trio.Nursery, virtual_clock: MockClock) -> None:
    async def fails(context: TaskContext) -> Mapping[str, tuple[float, float]]:
        return {} if context.concurrency == 2 else await sure(context)

    predictions = PredictionCache()
    predictions.set_predictor(fails, 10)
    nursery.start_soon(predictions.run)
    assert (await predictions.predict(replace(CONTEXT, concurrency=2), METHODS)).basis == "rule"
    assert (await predictions.predict(CONTEXT, METHODS)).basis == "model", "the model is still in use"


async def test_changed_price_needs_no_new_prediction(nursery: trio.Nursery, virtual_clock: MockClock) -> None:
    predictions, asked = PredictionCache(), []

    async def counted(context: TaskContext) -> Mapping[str, tuple[float, float]]:
        asked.append(context)
        return await sure(context)

    predictions.set_predictor(counted, 10)
    nursery.start_soon(predictions.run)
    facts = StageFacts(blocks=9, device=DeviceKind.CPU, memory_bytes=1 << 34, threads=4)
    for price in (1.0, 2.0):
        await predictions.predict(replace(CONTEXT, stage_facts=(replace(facts, price=price),)), METHODS)
    assert len(asked) == 1
    await predictions.predict(replace(CONTEXT, stage_facts=(replace(facts, threads=8),)), METHODS)
    assert len(asked) == 2
