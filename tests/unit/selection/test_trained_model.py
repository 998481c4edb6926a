"""An idle model's process ends, and another answers as before."""

import os
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import trio

from node.selection import trained_model, training_worker
from node.selection.trained_model import TrainedModel
from node.selection.training_worker import sample_of
from protocol.measurements import MethodInForce, ObservationKind
from protocol.observations import SignedObservation, bucket_of, sign_observation
from selector.prediction import train
from selector.task import TaskContext, method
from selector.task_buckets import Viewpoint
from tests.support.observations import NOW_S, key, observation, peer

CONTEXT = TaskContext.of({})
VIEWPOINT = Viewpoint(peer=peer(0), hardware="test", software="1", hour=bucket_of(NOW_S))
FASTER = method(engine="fused")


def workers() -> list[psutil.Process]:
    children = psutil.Process(os.getpid()).children()
    return [child for child in children if "node.selection.training_worker" in child.cmdline()]


def measured(number: int) -> SignedObservation:
    """Return an observation of a method that took half as long as the baseline."""
    made = observation(number)
    switches = MethodInForce(switches=dict(FASTER.switches), stage_policy={})
    measurements = replace(made.measurements, log_ratio_to_baseline=-0.7)
    kind = ObservationKind.BENCH
    return sign_observation(replace(made, kind=kind, method=switches, measurements=measurements), key(0))


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


async def test_is_unloaded_when_idle_and_answers_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trained_model, "IDLE_S", 0.0)
    samples = [sample for number in range(40) if (sample := sample_of(measured(number).observation)) is not None]
    predictor = train(samples, VIEWPOINT)  # here, as the worker trains at the lowest priority
    assert predictor is not None
    async with trio.open_nursery() as nursery:
        model = TrainedModel(tmp_path, nursery)
        assert not names_in(tmp_path), "the file has no name"
        model._is_kept = training_worker._keep(predictor, model._file)
        answer = await model.predict(CONTEXT)
        assert answer == training_worker._answer(predictor, CONTEXT.values())
        assert len(workers()) == 1
        await model.unload_if_idle()
        assert not workers()
        assert not model.is_loaded
        assert await model.predict(CONTEXT) == answer
        assert len(workers()) == 1
        await model.stop()
        assert not workers()


async def test_model_that_is_replaced_while_its_process_starts_leaves_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started, go_on = trio.Event(), trio.Event()
    start = trained_model._Worker.start

    async def slow(model_file: int) -> trained_model._Worker:
        worker = await start(model_file)
        started.set()
        await go_on.wait()
        return worker

    monkeypatch.setattr(trained_model._Worker, "start", slow)
    async with trio.open_nursery() as nursery:
        model = TrainedModel(tmp_path, nursery)

        async def ask() -> None:
            with pytest.raises(OSError, match="was replaced"):
                await model.predict(CONTEXT)

        async with trio.open_nursery() as asking:
            asking.start_soon(ask)
            await started.wait()
            await model.stop()
            go_on.set()
        assert not workers()


async def test_process_that_fails_is_an_error(tmp_path: Path) -> None:
    async with trio.open_nursery() as nursery:
        model = TrainedModel(tmp_path, nursery)
        with pytest.raises(OSError, match="training worker"):
            await model.predict(CONTEXT)  # there is nothing in the file
        await model.stop()
