"""Cost of learning: refresh of the model from 10,000 observations, and latency of choosing a method.

`python -m benchmarks.selector [--observations N] [--json]`
"""

import json
import random
import sqlite3
import tempfile
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import trio

from benchmarks.common import describe_machine, spread_of
from node.coordinator.observation import software_name, software_versions
from node.identity import Identity
from node.selection.learner import Learner
from node.selection.prediction_cache import PredictionCache
from node.storage.database import DATABASE_FILE, open_database
from node.storage.history import HistoryStore
from protocol.identity import BlockRange, JobId, ModelId
from protocol.measurements import (
    Measurements,
    MethodInForce,
    ModelFacts,
    Observation,
    ObservationKind,
    StageObservation,
    Workload,
)
from protocol.messages import SessionStatistics
from protocol.observations import bucket_of, sign_observation
from selector.heuristic import predicted_cost
from selector.task import TaskContext, portfolio
from selector.task_buckets import Viewpoint

WARM_CHOICES = 1000
COLD_CHOICES = 100
MODEL = ModelFacts(
    model=ModelId("ab" * 32),
    architecture="llama",
    block_count=30,
    hidden_size=576,
    vocabulary_size=49152,
    max_positions=8192,
    weight_bytes=538_000_000,
)


def observations(identity: Identity, count: int) -> list[Observation]:
    """Return observations of random tasks and methods, whose costs are the rule's with noise and a bias a method."""
    rng = random.Random(1)
    methods = portfolio("safetensors")
    bias = {method.name: rng.gauss(0, 0.3) for method in methods}
    found: list[Observation] = []
    now_s = int(time.time())
    for _ in range(count):
        method = rng.choice(methods)
        task = _task(rng)
        total_s = 2.718 ** (predicted_cost(task, method) + bias[method.name] + rng.gauss(0, 0.1))
        tokens = task.max_tokens
        tpot_s = total_s / (tokens + 4) if tokens > 1 else 0.0
        found.append(
            Observation(
                observer=identity.peer_id,
                job=JobId(rng.randbytes(16).hex()),
                kind=ObservationKind.SERVED,
                issued_at_s=now_s - rng.randrange(48 * 3600),
                model=MODEL,
                workload=Workload(
                    prompt_tokens=task.prompt_tokens,
                    completion_tokens=tokens,
                    concurrency=task.concurrency,
                    shared_prefix_share=task.shared_prefix_share,
                    repetitiveness=task.repetitiveness,
                ),
                method=MethodInForce(switches=dict(method.switches), stage_policy={"batching": "continuous"}),
                measurements=Measurements(
                    ttft_s=total_s - tpot_s * (tokens - 1),
                    tpot_s=tpot_s,
                    total_s=total_s,
                    tokens_per_s=tokens / total_s,
                ),
                route=(
                    StageObservation(
                        peer=identity.peer_id,
                        blocks=BlockRange(0, 30),
                        hardware="cpu",
                        statistics=SessionStatistics(steps=1, rows=1),
                    ),
                ),
                software=software_versions(),
            )
        )
    return found


def _task(rng: random.Random) -> TaskContext:
    return TaskContext(
        architecture=MODEL.architecture,
        block_count=MODEL.block_count,
        hidden_size=MODEL.hidden_size,
        vocabulary_size=MODEL.vocabulary_size,
        weight_bytes=MODEL.weight_bytes,
        prompt_tokens=rng.choice((16, 64, 256, 1024)),
        max_tokens=rng.choice((1, 8, 32, 128)),
        concurrency=rng.choice((1, 1, 2, 8)),
        shared_prefix_share=rng.choice((0.0, 0.0, 0.5, 0.9)),
        repetitiveness=rng.choice((0.0, 0.0, 0.8)),
        hardware="cpu",
    )


async def measure(count: int) -> dict[str, Any]:
    """Return the figures."""
    identity = Identity(b"9" * 32)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / DATABASE_FILE
        signed = [sign_observation(each, identity.private_key) for each in observations(identity, count)]
        async with open_database(path) as database:
            store = HistoryStore(database)
            for start in range(0, count, 1000):
                await store.add_many(signed[start : start + 1000])
            predictions = PredictionCache()
            viewpoint = Viewpoint(
                peer=identity.peer_id,
                hardware="cpu",
                software=software_name(software_versions()),
                hour=bucket_of(int(time.time())),
            )

            async def held() -> int:
                with closing(sqlite3.connect(path)) as connection:
                    return int(connection.execute("SELECT count(*) FROM observations").fetchone()[0])

            learner = Learner(path, predictions, count=held, viewpoint=lambda: viewpoint)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(learner.run)
                while learner.status is None:
                    await trio.sleep(0.1)
                cold, warm = await _choices(predictions)
                nursery.cancel_scope.cancel()
    status = learner.status
    return {
        **describe_machine(),
        "observations": count,
        "experiences": status.sample_count,
        "training_s": status.training_s,
        "peak_mib": status.peak_bytes / 2**20,
        "miss_ms": spread_of(cold).median,
        "miss_p99_ms": spread_of(cold).p99,
        "choice_ms": spread_of(warm).median,
        "choice_p99_ms": spread_of(warm).p99,
        "late": predictions.late,
    }


async def _choices(predictions: PredictionCache) -> tuple[list[float], list[float]]:
    """Return the times of choices with and without a prediction, in milliseconds."""
    methods = portfolio("safetensors")

    async def choose(task: TaskContext) -> float:
        began_s = time.perf_counter()
        prediction = await predictions.predict(task, methods)
        min(prediction.table.values(), key=lambda each: each.log_cost)
        return 1000 * (time.perf_counter() - began_s)

    rng = random.Random(2)
    tasks = [replace(_task(rng), prompt_tokens=rng.randrange(1, 4096)) for _ in range(COLD_CHOICES)]
    cold = [await choose(task) for task in tasks]
    await trio.sleep(1.0)
    warm = [await choose(rng.choice(tasks)) for _ in range(WARM_CHOICES)]
    return cold, warm


@click.command()
@click.option("--observations", type=click.IntRange(1), default=10_000, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def main(observations: int, as_json: bool) -> None:
    """Measure the refresh of the model and the latency of a choice."""
    found = trio.run(measure, observations)
    if as_json:
        print(json.dumps(found))
        return
    print(f"load average {found['load_average']:.1f} on {found['cores']} cores")
    print(
        f"refresh with {found['observations']} observations   {found['training_s']:.1f} s, {found['peak_mib']:.0f} MiB"
    )
    print(f"choice, table at hand    {found['choice_ms']:.2f} ms, p99 {found['choice_p99_ms']:.2f} ms")
    print(
        f"choice, predicted anew    {found['miss_ms']:.1f} ms, p99 {found['miss_p99_ms']:.1f} ms, {found['late']} late"
    )


if __name__ == "__main__":
    main()
