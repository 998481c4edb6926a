"""`metaswarm explain`: what a task would get, for people and for programs."""

import json

import pytest
from rich.console import Console

from node.cli import run
from node.cli.explain import render_explanation, short_method
from node.coordinator.submission import JobError, JobErrorCode
from protocol.measurements import QualityBound
from selector.task import BASELINE, method
from tests.unit.api.fakes import FASTER, FakeNode, FakeSubmitter
from tests.unit.cli.conftest import ServeNode


def test_prints_choice_with_predictions(serve: ServeNode, capsys: pytest.CaptureFixture[str]) -> None:
    node = FakeNode()
    assert (
        run(["explain", "--api", serve(node), "--model", "tiny", "--prompt-tokens", "300", "--concurrency", "3"]) == 0
    )
    output = capsys.readouterr().out
    for fact in ("engine=fused", "1.80x", "1.50-2.25", "chosen", "a model of 120 observations", "3 trials in 12"):
        assert fact in output
    ((request, told),) = node.explained
    assert (len(request.prompt_tokens or ()), told["concurrency"]) == (300, 3)


@pytest.mark.parametrize(
    ("confidence", "told"),
    [(0.9, "90% that no other method is clearly better"), (None, "unknown: the route does not offer")],
)
def test_prints_how_sure_the_choice_is(
    confidence: float | None, told: str, serve: ServeNode, capsys: pytest.CaptureFixture[str]
) -> None:
    node = FakeNode()
    node.confidence = confidence
    url = serve(node)
    assert run(["explain", "--api", url, "--model", "tiny"]) == 0
    assert told in capsys.readouterr().out
    assert run(["explain", "--api", url, "--model", "tiny", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["confidence"] == confidence


def test_methods_that_cannot_run_are_told_apart_from_those_that_can(
    serve: ServeNode, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["explain", "--api", serve(FakeNode()), "--model", "tiny"]) == 0
    table, _, below = capsys.readouterr().out.partition("chosen   ")
    assert "draft-8" not in table
    assert "speculation=draft-8: not every peer of the route" in below
    assert "2.01 s" in table, "votes are durations"


def test_votes_may_be_absurd(serve: ServeNode, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["explain", "--api", serve(FakeNode()), "--model", "tiny", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    answer["methods"][0]["votes"] = {"liar": 1e9, "other": -1e9}
    Console(width=200).print(render_explanation(answer))
    assert "0.00 s" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("confidence", "why"), [(0.5, "as this is not sure enough"), (0.9, "as the votes say otherwise")]
)
def test_says_why_a_trial_starts(
    confidence: float, why: str, serve: ServeNode, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["explain", "--api", serve(FakeNode()), "--model", "tiny", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out) | {"confidence": confidence, "probes": [FASTER]}
    Console(width=200).print(render_explanation(answer))
    assert f"{why}, jobs like this one" in capsys.readouterr().out


def test_json_is_api_document(serve: ServeNode, capsys: pytest.CaptureFixture[str]) -> None:
    node = FakeNode()
    assert run(["explain", "--api", serve(node), "--quality", "near", "--budget", "2.5", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["agreed"] == FASTER
    ((request, _),) = node.explained
    assert (request.quality, request.budget) == (QualityBound.NEAR, 2.5)


def test_refusal_is_one_line(serve: ServeNode, capsys: pytest.CaptureFixture[str]) -> None:
    refuse = JobError(JobErrorCode.UNCOVERED, "no peer serves blocks 3-4 of tiny", retry_after_s=2.0)
    assert run(["explain", "--api", serve(FakeNode(FakeSubmitter(refuse=refuse)))]) == 1
    assert "no peer serves blocks 3-4 of tiny" in capsys.readouterr().err


def test_short_method_shows_changed_switches() -> None:
    assert short_method(BASELINE.name) == "baseline"
    assert short_method(method(engine="fused", prefix_cache="on").name) == "engine=fused prefix_cache=on"
