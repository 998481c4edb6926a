from dataclasses import replace

import pytest
from prometheus_client import generate_latest

from node.coordinator.job_report import JobReport
from node.coordinator.submission import JobErrorCode, JobRequest, Selection
from node.telemetry.metrics import MAX_LABEL_VALUES, BoundedLabel, NodeMetrics
from protocol.measurements import Objective
from protocol.messages import SessionStatistics
from protocol.tensors import Pooling
from tests.unit.api.fakes import JOB, make_result

REPORT = JobReport(
    request=JobRequest(model="tiny", prompt="x"),
    outcome="done",
    is_trial=False,
    began_s=10.0,
    prepared_s=10.1,
    routed_s=10.2,
    first_token_s=10.5,
    last_token_s=11.5,
    ended_s=11.6,
    job_id=JOB,
    model="tiny",
    prompt_tokens=5,
    completion_tokens=11,
    result=make_result("x", (1, 2)),
)


def text_of(metrics: NodeMetrics) -> str:
    return generate_latest(metrics.registry).decode()


def test_counts_tokens_and_times_of_a_job() -> None:
    metrics = NodeMetrics()
    metrics.on_job(REPORT)
    found = text_of(metrics)
    for line in (
        'metaswarm_jobs_total{kind="user",model="tiny",outcome="done"} 1.0',
        'metaswarm_time_to_first_token_seconds_sum{model="tiny"} 0.5',
        'metaswarm_time_per_output_token_seconds_bucket{le="0.1",model="tiny"} 1.0',
        'metaswarm_prompt_tokens_total{model="tiny"} 5.0',
        'metaswarm_generated_tokens_total{model="tiny"} 11.0',
        'metaswarm_cached_prompt_tokens_total{model="tiny"} 2.0',
    ):
        assert line in found


def chosen(objective: Objective, replays: int = 0) -> JobReport:
    """Return the report of a job for which a method was chosen, at a predicted cost of 0.25 seconds."""
    selection = Selection(
        basis="rule",
        experiences=0,
        predictions={},
        accepted=(),
        explored=False,
        confidence=None,
        probes=(),
        predicted_s=0.25,
        predicted_speedup=1.0,
        regret_s=0.0,
    )
    request = replace(REPORT.request, objective=objective)
    result = replace(make_result("x", (1, 2)), selection=selection, is_replayed=replays > 0)
    return replace(REPORT, request=request, result=result, replays=replays)


@pytest.mark.parametrize(
    ("objective", "measured_s"), [(Objective.LATENCY, 0.5), (Objective.THROUGHPUT, 0.3), (Objective.COST, 0.3)]
)
def test_cost_ratio_is_of_what_the_objective_predicts(objective: Objective, measured_s: float) -> None:
    metrics = NodeMetrics()
    metrics.on_job(chosen(objective))
    metrics.on_job(chosen(objective, replays=1))
    ratio = metrics.registry.get_sample_value("metaswarm_job_cost_ratio_sum")
    assert ratio == pytest.approx(measured_s / 0.25), "and the one that lost a stage is left out"


def test_cost_ratio_needs_what_every_stage_computed() -> None:
    metrics, job = NodeMetrics(), chosen(Objective.COST)
    assert job.result is not None
    stages = [replace(job.result.route[0], statistics=SessionStatistics()), *job.result.route[1:]]
    metrics.on_job(replace(job, result=replace(job.result, route=tuple(stages))))
    assert metrics.registry.get_sample_value("metaswarm_job_cost_ratio_count") == 0


def test_embeddings_have_no_first_token() -> None:
    metrics = NodeMetrics()
    metrics.on_job(
        replace(REPORT, request=JobRequest(model="tiny", prompt="x", pooling=Pooling.MEAN), completion_tokens=0)
    )
    found = text_of(metrics)
    assert 'metaswarm_job_duration_seconds_count{model="tiny"} 1.0' in found
    assert 'metaswarm_time_to_first_token_seconds_count{model="tiny"}' not in found


def test_trials_are_counted_apart() -> None:
    metrics = NodeMetrics()
    metrics.on_job(replace(REPORT, is_trial=True))
    found = text_of(metrics)
    assert 'metaswarm_jobs_total{kind="trial",model="tiny",outcome="done"} 1.0' in found
    assert 'metaswarm_generated_tokens_total{model="tiny"}' not in found


def test_names_of_unknown_models_are_no_labels() -> None:
    metrics = NodeMetrics()
    for number in range(3):
        request = JobRequest(model=f"made-up-{number}", prompt="x")
        rejected = replace(REPORT, request=request, outcome="rejected", job_id=None, first_token_s=0.0, model="")
        metrics.on_job(replace(rejected, error=JobErrorCode.MODEL_NOT_FOUND, result=None))
    found = text_of(metrics)
    assert "made-up" not in found
    assert 'metaswarm_job_errors_total{code="model_not_found"} 3.0' in found


def test_label_values_are_bounded() -> None:
    label = BoundedLabel()
    values = {label(f"value-{number}") for number in range(2 * MAX_LABEL_VALUES)}
    assert len(values) == MAX_LABEL_VALUES + 1
    assert label("value-0") == "value-0"


def test_engine_steps_are_counted_beyond_the_end_of_a_span() -> None:
    metrics = NodeMetrics()
    for _ in range(2):  # of two workers, one after the other
        metrics.on_step("tiny", 0.25)
    found = text_of(metrics)
    assert 'metaswarm_engine_steps_total{model="tiny"} 2.0' in found
    assert 'metaswarm_engine_compute_seconds_total{model="tiny"} 0.5' in found
