"""What happens in a node, counted for Prometheus: requests, jobs, and the slices that its stages compute.

What the node is at the moment, such as peers and KV memory, is read from its status when `/metrics` is requested:
`node.api.metrics`. Every label has a bounded set of values, as each makes a time series of its own.
"""

from typing import Final

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, disable_created_metrics

from node.coordinator.job_report import JobReport
from node.stages.session_report import SessionReport
from node.telemetry.requests import RequestReport
from protocol.measurements import Objective, compute_s_of

MAX_LABEL_VALUES: Final = 64
OTHER: Final = "other"
"""In place of a label's values beyond these."""

_METHODS: Final = frozenset({"DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT"})

# A page of cached models answers in milliseconds, a prompt of 100,000 tokens on an old CPU takes minutes.
_SECONDS: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_TOKEN_SECONDS: Final = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2.5)
_STEP_SECONDS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
_RATIOS: Final = (0.25, 0.5, 0.7, 0.8, 0.9, 1.0, 1.1, 1.25, 1.5, 2.0, 4.0)


class BoundedLabel:
    """A label whose first `MAX_LABEL_VALUES` values are kept; later ones become `other`."""

    def __init__(self) -> None:
        self._values: set[str] = set()

    def __call__(self, value: str) -> str:
        """Return the value to use."""
        if value not in self._values:
            if len(self._values) >= MAX_LABEL_VALUES:
                return OTHER
            self._values.add(value)
        return value


class NodeMetrics:
    """The counters and histograms of one node, in a registry of its own. Implements what `Telemetry` reports to."""

    def __init__(self) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self.model_label = BoundedLabel()
        self._method_label = BoundedLabel()

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"metaswarm_{name}", text, labels, registry=registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
            return Histogram(f"metaswarm_{name}", text, labels, buckets=buckets, registry=registry)

        self._requests = counter(
            "http_requests_total", "Requests to the API, by route and status.", "route", "method", "status"
        )
        self._request_seconds = histogram(
            "http_request_duration_seconds", "Time until a request was answered, streams included.", _SECONDS, "route"
        )
        self._jobs = counter("jobs_total", "Jobs submitted at this node that have ended.", "model", "kind", "outcome")
        self._job_errors = counter("job_errors_total", "Jobs that failed or were rejected, by error code.", "code")
        self._routed = histogram("job_routing_seconds", "Time from a job to its open route.", _SECONDS, "model")
        self._ttft = histogram("time_to_first_token_seconds", "Time from a job to its first token.", _SECONDS, "model")
        self._tpot = histogram(
            "time_per_output_token_seconds", "Mean time between the tokens of a job.", _TOKEN_SECONDS, "model"
        )
        self._job_seconds = histogram("job_duration_seconds", "Time from a job to its last token.", _SECONDS, "model")
        self._prompt = counter("prompt_tokens_total", "Tokens of prompts.", "model")
        self._cached = counter("cached_prompt_tokens_total", "Of them, those found in prefix caches.", "model")
        self._generated = counter("generated_tokens_total", "Tokens generated.", "model")
        self._drafts = counter("accepted_draft_tokens_total", "Of them, those that were drafted.", "model")
        self._replays = counter("stage_replacements_total", "Stages that were lost and replaced during jobs.", "model")
        self._choices = counter(
            *("method_choices_total", "Jobs done, by the method that the votes agreed on, and by what predicted it."),
            *("method", "basis", "explored"),
        )
        self._ratio = histogram("job_cost_ratio", "Measured over predicted cost of jobs that lost no stage.", _RATIOS)
        self._regret = counter("regret_seconds_total", "Predicted cost over that of the best method, of all jobs.")
        self._queue = histogram(
            "stage_queue_seconds", "Time that rows waited for the engine of a span.", _STEP_SECONDS, "model", "phase"
        )
        self._step = histogram(
            "stage_compute_seconds", "Time of an engine's step, for each slice in it.", _STEP_SECONDS, "model", "phase"
        )
        self._steps = counter("engine_steps_total", "Steps of the engines of spans here.", "model")
        self._compute_seconds = counter("engine_compute_seconds_total", "Time in these steps.", "model")
        self._rows = counter("stage_rows_total", "Rows computed for sessions that ended.", "model", "phase")
        self._cached_rows = counter("stage_cached_rows_total", "Rows not computed, as the stage had them.", "model")
        self._sessions = counter("stage_sessions_total", "Sessions that began here and have ended.", "model")

    def on_request(self, report: RequestReport) -> None:
        """Count a request to the API."""
        method = report.method if report.method in _METHODS else OTHER
        self._requests.labels(report.route, method, str(report.status)).inc()
        self._request_seconds.labels(report.route).observe(report.ended_s - report.began_s)

    def on_job(self, report: JobReport) -> None:
        """Count a job."""
        model = self.model_label(report.model) if report.model else OTHER
        self._jobs.labels(model, "trial" if report.is_trial else "user", report.outcome).inc()
        if report.error is not None:
            self._job_errors.labels(report.error.value).inc()
        if report.is_trial or not report.first_token_s:
            return
        self._routed.labels(model).observe(report.routed_s - report.began_s)
        if report.request.pooling is None:
            self._ttft.labels(model).observe(report.first_token_s - report.began_s)
        if report.completion_tokens > 1:
            decode_s = report.last_token_s - report.first_token_s
            self._tpot.labels(model).observe(decode_s / (report.completion_tokens - 1))
        self._prompt.labels(model).inc(report.prompt_tokens)
        self._generated.labels(model).inc(report.completion_tokens)
        self._replays.labels(model).inc(report.replays)
        if (result := report.result) is None:
            return
        self._job_seconds.labels(model).observe(result.timing.total_s)
        self._cached.labels(model).inc(result.usage.cached_tokens)
        self._drafts.labels(model).inc(result.usage.accepted_draft_tokens)
        if (selection := result.selection) is not None:
            method = self._method_label(result.method.name)
            self._choices.labels(method, selection.basis, str(selection.explored).lower()).inc()
            self._regret.inc(max(0.0, selection.regret_s))
            is_latency = report.request.objective is Objective.LATENCY  # else what is predicted is computing
            measured_s = result.timing.total_s if is_latency else compute_s_of(result.route)
            if selection.predicted_s > 0 and measured_s > 0 and not result.is_replayed:
                self._ratio.observe(measured_s / selection.predicted_s)

    def on_step(self, model: str, compute_s: float) -> None:
        """Count a step of an engine here: its own figures are those of one worker process, which may end."""
        model = self.model_label(model)
        self._steps.labels(model).inc()
        self._compute_seconds.labels(model).inc(compute_s)

    def on_slice(self, model: str, phase: str, queue_s: float, step_s: float) -> None:
        """Count a slice that a stage here has computed."""
        model = self.model_label(model)
        self._queue.labels(model, phase).observe(queue_s)
        self._step.labels(model, phase).observe(step_s)

    def on_session(self, model: str, report: SessionReport) -> None:
        """Count a session on a stage here."""
        model = self.model_label(model)
        self._sessions.labels(model).inc()
        self._cached_rows.labels(model).inc(report.cached_rows)
        for phase, totals in (("prefill", report.phases.prefill), ("decode", report.phases.decode)):
            self._rows.labels(model, phase).inc(totals.rows)
