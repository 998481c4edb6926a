import errno
import io
import itertools
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from node.api.fields import MAX_STOPS
from node.api.generation import Outcome
from node.api.job_document import describe_job
from node.api.openai.answers import CompletionWriter
from node.cli import run, target
from node.coordinator.chat import ChatMessage
from node.coordinator.submission import JobError, JobErrorCode, JobEvent, JobRequest
from protocol.measurements import Objective, QualityBound
from tests.unit.api.fakes import JOB, MODEL, PEERS, FakeNode, FakeSubmitter, make_result
from tests.unit.cli.conftest import ServeNode
from tests.unit.cli.terminal import on_terminal

COST = {"objective": "latency", "budget": None, "predicted": 0.4, "actual": 0.3}
DOCUMENT = {
    "job_id": JOB,
    "model": "tiny",
    "text": "Hello, wörld",
    "token_ids": [0, 1, 2],
    "finish_reason": "stop",
    "usage": {"prompt_tokens": 5, "completion_tokens": 3, "cached_tokens": 2, "accepted_draft_tokens": 1},
    "timing": {"ttft_s": 0.25, "tpot_s": 0.03, "total_s": 0.5},
    "cost": COST,
    "route": [{"peer": PEERS[0], "start": 0, "end": 4}, {"peer": PEERS[1], "start": 4, "end": 8}],
    "method": {
        "name": "arithmetic=fp32",
        "switches": {"arithmetic": "fp32"},
        "stage_policy": {"batching": "continuous"},
    },
    "consensus": {
        "votes": [{"peer": PEERS[0], "scores": {"arithmetic=fp32": -1.5}, "table_digest": None}],
        "agreed": "arithmetic=fp32",
        "epoch": None,
        "table_digest": None,
        "weighed": False,
    },
    "selection": None,
    "replays": 1,
}


@pytest.fixture
def node() -> FakeNode:
    return FakeNode()


@pytest.fixture
def api(node: FakeNode, serve: ServeNode) -> list[str]:
    return ["--api", serve(node)]


def test_streams_text_to_stdout(api: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["submit", "Hi", *api]) == 0
    assert capsys.readouterr() == ("Hello, wörld\n", "")


def test_unicode_line_ends_in_a_text(
    node: FakeNode, api: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A node that sends them as they are, as JSON may."""
    monkeypatch.setattr("node.api.openai.answers.json_line", partial(json.dumps, ensure_ascii=False))
    node.submitter.words = ("one\u2028two", "\u2029three\x85four")
    assert run(["submit", "Hi", *api]) == 0
    assert capsys.readouterr() == ("one\u2028two\u2029three\x85four\n", "")
    assert run(["submit", "Hi", "--json", *api]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert json.loads(line)["text"] == "one\u2028two\u2029three\x85four"


@pytest.mark.parametrize("chat", [[], ["--chat"]])
def test_json_document(api: list[str], chat: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["submit", "Hi", "--json", *chat, *api]) == 0
    assert json.loads(capsys.readouterr().out) == DOCUMENT


def test_defaults_to_greedy_and_only_complete_model(node: FakeNode, api: list[str]) -> None:
    assert run(["submit", "Hi", *api]) == 0
    (job,) = node.submitter.requests
    assert (job.model, job.prompt, job.messages) == ("tiny", "Hi", None)
    assert (job.temperature, job.max_tokens, job.seed, job.stop) == (0.0, 256, None, ())


def test_options_reach_job(node: FakeNode, api: list[str]) -> None:
    options = "--model other --chat --max-tokens 7 --temperature 0.5 --top-p 0.9 --seed 11 --stop A --stop B"
    more = "--quality near --method arithmetic=bf16 --ignore-eos"
    draws = (
        "--top-k 5 --min-p 0.05 --repetition-penalty 1.2 --frequency-penalty -0.5 --presence-penalty 0.25 "
        "--logit-bias 7=-100 --logit-bias 9=1.5 --stop-token-id 3 --stop-token-id 4 --min-tokens 2 "
        "--objective cost --budget 2.5"
    )
    assert run(["submit", "Hi", *options.split(), *more.split(), *draws.split(), *api]) == 0
    (job,) = node.submitter.requests
    assert (job.model, job.messages) == ("other", (ChatMessage(role="user", content="Hi"),))
    assert (job.max_tokens, job.temperature, job.top_p, job.seed, job.stop) == (7, 0.5, 0.9, 11, ("A", "B"))
    assert (job.quality, job.method, job.ignore_eos) == (QualityBound.NEAR, "arithmetic=bf16", True)
    assert (job.objective, job.budget) == (Objective.COST, 2.5)
    assert (job.top_k, job.min_p, job.logit_bias) == (5, 0.05, ((7, -100.0), (9, 1.5)))
    assert (job.repetition_penalty, job.frequency_penalty, job.presence_penalty) == (1.2, -0.5, 0.25)
    assert (job.stop_token_ids, job.min_tokens) == ((3, 4), 2)


@pytest.mark.parametrize(
    "options",
    [
        ["--budget", "0"],
        ["--budget", "inf"],
        ["--temperature", "nan"],
        ["--objective", "speed"],
        ["--logit-bias", "the=1"],
        ["--logit-bias", "5=nan"],
    ],
)
def test_refuses_options_that_are_not_valid(
    options: list[str], node: FakeNode, api: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["submit", "Hi", *options, *api]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert node.submitter.requests == []


def test_help_names_the_limit_of_stop_texts(node: FakeNode, api: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["submit", "--help"]) == 0
    assert f"Stop text; repeatable, up to {MAX_STOPS}." in " ".join(capsys.readouterr().out.split())
    stops = [f"--stop={number}" for number in range(MAX_STOPS)]
    assert run(["submit", "Hi", *stops, *api]) == 0
    assert len(node.submitter.requests[0].stop) == MAX_STOPS
    assert run(["submit", "Hi", *stops, "--stop=more", *api]) == 1


@pytest.mark.parametrize("verb", ["submit Hi", "status"])
@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_standard_stream_takes_what_is_written(verb: str, closed: str, api: list[str]) -> None:
    command = f'exec "$0" -c "from node.cli import main; main()" {verb} {" ".join(api)} {closed}'
    done = subprocess.run(["sh", "-c", command, sys.executable], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_accepts_negative_seed(node: FakeNode, api: list[str]) -> None:
    assert run(["submit", "Hi", "--seed", "-1", *api]) == 0
    assert node.submitter.requests[0].seed == -1


def test_token_ids_as_prompt_and_output(
    node: FakeNode, api: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for text in ("3 1 4", "[3, 1, 4]"):
        assert run(["submit", "--token-ids", text, *api]) == 0
        assert node.submitter.requests.pop().prompt_tokens == (3, 1, 4)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": [2, 7]}\n')
    assert run(["submit", "--file", str(tmp_path / "prompts.jsonl"), *api]) == 0
    assert node.submitter.requests.pop().prompt_tokens == (2, 7)
    for wrong in (["--token-ids", "3 x"], ["--token-ids", ""], ["--token-ids", "3", "--chat"]):
        assert run(["submit", *wrong, *api]) == 2
    assert not node.submitter.requests


def test_dash_reads_stdin(node: FakeNode, api: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("wörld\n".encode())))
    assert run(["submit", "-", *api]) == 0
    assert node.submitter.requests[0].prompt == "wörld\n"


@pytest.mark.parametrize(
    ("complete", "says"),
    [
        (
            [],
            (
                "no model is complete in this swarm: serve one with `metaswarm node --serve MODEL`; "
                "incomplete: tiny (no peer serves blocks 1-3), "
            ),
        ),
        ([0, 1], "several models are complete; choose one with --model: tiny, broken"),
    ],
)
def test_ambiguous_or_missing_model_is_an_error(
    complete: list[int],
    says: str,
    node: FakeNode,
    api: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    models = node.models()
    for index, model in enumerate(models):
        model["complete"] = index in complete
        model["uncovered"] = [] if index in complete else [(1, 3)]
    monkeypatch.setattr(node, "models", lambda: models)
    assert run(["submit", "Hi", *api]) == 1
    assert capsys.readouterr().err.startswith(f"metaswarm: {says}")


@pytest.mark.parametrize("moment", ["refuse", "fail"])
@pytest.mark.parametrize("as_json", [[], ["--json"]])
def test_job_error_is_one_line(
    moment: str, as_json: list[str], node: FakeNode, api: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    setattr(node.submitter, moment, JobError(JobErrorCode.UNCOVERED, "no peer serves blocks 4-8 of tiny"))
    assert run(["submit", "Hi", "--model", "tiny", *as_json, *api]) == 1
    output = capsys.readouterr()
    assert output.err.endswith("metaswarm: no peer serves blocks 4-8 of tiny\n")
    assert as_json == [] or output.out == ""


def test_error_without_node_says_how_to_start_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["submit", "Hi", "--api", "http://127.0.0.1:1"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "http://127.0.0.1:1" in line
    assert "`metaswarm node`" in line


def test_silent_node_counts_as_dead(
    node: FakeNode, api: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("node.cli.client.SILENCE_TIMEOUT_S", 0.2)
    node.submitter.hang = True
    assert run(["submit", "Hi", *api]) == 1
    output = capsys.readouterr()
    assert output.out == "Hello, wörld\n"
    assert f"the node at {api[1]} is silent" in output.err


def test_request_that_json_cannot_say_is_told_from_a_foreign_server(
    serve: ServeNode, node: FakeNode, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "Hi", "temperature": 1e999}\n{"prompt": "Hi", "stop": "\\ud800"}\n')
    assert run(["submit", "--file", str(file), "--model", "tiny", "--api", serve(node)]) == 1
    errors = [json.loads(line)["error"]["message"] for line in capsys.readouterr().out.splitlines()]
    assert [error.partition(":")[0] for error in errors] == ["the request is not valid JSON"] * 2
    assert node.submitter.requests == []


def test_api_key_from_environment(
    serve: ServeNode, node: FakeNode, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    api = ["--api", serve(node, "sesame")]
    assert run(["submit", "Hi", *api]) == 1
    assert "requires an API key: set METASWARM_API_KEY" in capsys.readouterr().err
    monkeypatch.setenv("METASWARM_API_KEY", "wrong")
    assert run(["submit", "Hi", *api]) == 1
    assert "does not accept the API key in METASWARM_API_KEY" in capsys.readouterr().err
    monkeypatch.setenv("METASWARM_API_KEY", "sesame\n")  # as in a file that a secret is mounted from
    assert run(["submit", "Hi", *api]) == 0


@pytest.mark.parametrize("verb", [["submit", "Hi"], ["status"]])
@pytest.mark.parametrize("key", ["ses\name", "sésame", "open sesame"])
def test_api_key_that_no_header_can_carry_is_refused_and_not_shown(
    verb: list[str], key: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("METASWARM_API_KEY", key)
    assert run([*verb, "--api", "http://127.0.0.1:1"]) == 2
    error = "metaswarm: METASWARM_API_KEY: expected visible ASCII characters without spaces\n"
    assert capsys.readouterr().err == error


class TestBootstrap:
    @pytest.fixture
    def joined(self, serve: ServeNode, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
        """Whom nodes of one command joined; each is a fake node that hears of its model only after a while."""
        joined = []

        @contextmanager
        def local_node(serve_model: str | None, bootstrap: tuple[str, ...], *, share_data_dir: bool) -> Iterator[str]:
            assert (serve_model, share_data_dir) == (None, False)
            joined.append(bootstrap)
            node = FakeNode()
            answers = iter([[], [], node.models()])
            monkeypatch.setattr(node, "models", lambda: next(answers))
            yield serve(node)

        monkeypatch.setattr("node.cli.local_node.local_node", local_node)
        monkeypatch.setattr(target, "DISCOVERY_INTERVAL_S", 0)
        return joined

    @pytest.mark.parametrize("model", [[], ["--model", "tiny"]])
    def test_starts_node_without_one_here(
        self,
        model: list[str],
        joined: list[tuple[str, ...]],
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        monkeypatch.setenv("METASWARM_API", "127.0.0.1:1")
        assert run(["submit", "Hi", "--bootstrap", "peers.yaml", *model]) == 0
        assert capsys.readouterr().out == "Hello, wörld\n"
        assert joined == [("peers.yaml",)]

    @pytest.mark.parametrize(("model", "code"), [([], 1), (["--model", MODEL[:16]], 0)])
    def test_unnamed_model_needs_its_id(
        self,
        model: list[str],
        code: int,
        serve: ServeNode,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        @contextmanager
        def local_node(serve_model: str | None, bootstrap: tuple[str, ...], *, share_data_dir: bool) -> Iterator[str]:
            node = FakeNode()
            foreign = node.models()[0] | {"complete": False, "local": False, "name": MODEL[:16]}
            monkeypatch.setattr(node, "models", lambda: [foreign])
            yield serve(node)

        monkeypatch.setattr("node.cli.local_node.local_node", local_node)
        monkeypatch.setattr(target, "DISCOVERY_INTERVAL_S", 0)
        monkeypatch.setattr(target, "DISCOVERY_TIMEOUT_S", 60 if model else 0)
        monkeypatch.setenv("METASWARM_API", "127.0.0.1:1")
        assert run(["submit", "Hi", "--bootstrap", "peers.yaml", *model]) == code
        assert (f"choose one that you trust with --model: {MODEL[:16]}" in capsys.readouterr().err) is (code == 1)

    def test_uses_running_node(
        self, joined: list[tuple[str, ...]], api: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("METASWARM_API", api[1])
        assert run(["submit", "Hi", "--bootstrap", "peers.yaml"]) == 0
        assert joined == []

    def test_api_flag_prevents_another_node(self, joined: list[tuple[str, ...]]) -> None:
        assert run(["submit", "Hi", "--bootstrap", "peers.yaml", "--api", "http://127.0.0.1:1"]) == 1
        assert joined == []


class TestFile:
    def write(self, tmp_path: Path, *lines: str) -> list[str]:
        (tmp_path / "prompts.jsonl").write_text("\n".join(lines) + "\n")
        return ["--file", str(tmp_path / "prompts.jsonl")]

    def documents(self, capsys: pytest.CaptureFixture[str]) -> list[Any]:
        return [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    def test_lines_override_options(
        self, tmp_path: Path, node: FakeNode, api: list[str], capsys: pytest.CaptureFixture[str]
    ) -> None:
        lines = (
            '{"prompt": "a", "max_tokens": 3, "stop": ["x"]}',
            "",
            '{"prompt": "b", "chat": true, "model": "other"}',
        )
        assert run(["submit", *self.write(tmp_path, *lines), "--seed", "5", *api]) == 0
        assert self.documents(capsys) == [DOCUMENT, DOCUMENT]
        first, second = sorted(node.submitter.requests, key=lambda job: job.model, reverse=True)
        assert (first.prompt, first.max_tokens, first.stop, first.seed) == ("a", 3, ("x",), 5)
        assert (second.messages, second.max_tokens, second.model, second.seed) == (
            (ChatMessage(role="user", content="b"),),
            256,
            "other",
            5,
        )

    def test_requests_of_batches(
        self, tmp_path: Path, node: FakeNode, api: list[str], capsys: pytest.CaptureFixture[str]
    ) -> None:
        """The OpenAI API's format: several prompts are scored in one line, texts embedded in another."""
        score = {"prompt": ["one two", "three"], "max_tokens": 0, "echo": True, "logprobs": 0}
        lines = [
            {"custom_id": "s", "method": "POST", "url": "/v1/completions", "body": score},
            {"custom_id": "e", "url": "/v1/embeddings", "body": {"model": "other", "input": ["a", "bc"]}},
        ]
        file = self.write(tmp_path, *map(json.dumps, lines), '{"prompt": "x"}')
        assert run(["submit", *file, "--model", "tiny", *api]) == 0
        scored, embedded, text = self.documents(capsys)
        assert (scored["custom_id"], embedded["custom_id"], text) == ("s", "e", DOCUMENT)
        assert list(scored) == ["id", "custom_id", "response", "error"]
        assert scored["id"].startswith("batch_req_")
        assert scored["id"] != embedded["id"]
        assert (scored["response"]["status_code"], scored["error"]) == (200, None)
        assert len({each["response"]["request_id"] for each in (scored, embedded)} - {""}) == 2
        choices = scored["response"]["body"]["choices"]
        assert [choice["logprobs"]["token_logprobs"] for choice in choices] == [[None, -0.75], [None]]
        assert [item["index"] for item in embedded["response"]["body"]["data"]] == [0, 1]
        assert {job.model for job in node.submitter.requests} == {"tiny", "other"}
        node.submitter.refuse = JobError(JobErrorCode.FAILED, "a stage failed")
        assert run(["submit", *file, *api]) == 1
        failed, *_ = self.documents(capsys)
        assert (failed["id"], failed["custom_id"], failed["error"]) == (scored["id"], "s", None)
        assert failed["response"]["status_code"] == 502
        assert failed["response"]["body"]["error"]["message"] == "a stage failed"
        assert failed["response"]["request_id"]

    @pytest.mark.parametrize(
        ("line", "says"),
        [
            ({"custom_id": "a", "url": "/v1/audio", "body": {}}, "url is '/v1/audio'"),
            ({"url": "/v1/embeddings", "body": {}}, "custom_id"),
            ({"custom_id": "a", "url": "/v1/completions", "body": {"stream": True}}, "leave out stream"),
            ({"custom_id": "a", "url": "/v1/completions", "body": {}, "modle": "b"}, "'modle'"),
            ({"custom_id": "a", "url": "/v1/completions", "body": {"model": []}}, "model is []"),
            ({"prompt": "x", "model": {}}, "model is {}"),
        ],
    )
    def test_refuses_bad_requests_of_batches(
        self, tmp_path: Path, api: list[str], capsys: pytest.CaptureFixture[str], line: dict[str, Any], says: str
    ) -> None:
        assert run(["submit", *self.write(tmp_path, json.dumps(line)), *api]) == 2
        assert says in capsys.readouterr().err

    def test_refuses_a_batch_with_two_requests_of_one_name(
        self, tmp_path: Path, node: FakeNode, api: list[str], capsys: pytest.CaptureFixture[str]
    ) -> None:
        line = json.dumps({"custom_id": "a", "url": "/v1/completions", "body": {"prompt": "x"}})
        assert run(["submit", *self.write(tmp_path, line, line), *api]) == 2
        assert "line 2: custom_id 'a' is also that of line 1" in capsys.readouterr().err
        assert not node.submitter.requests

    def test_unicode_line_ends_in_a_prompt(self, tmp_path: Path, node: FakeNode, api: list[str]) -> None:
        prompt = "one\u2028two\u2029three\x85four"
        assert run(["submit", *self.write(tmp_path, json.dumps({"prompt": prompt}, ensure_ascii=False)), *api]) == 0
        assert [job.prompt for job in node.submitter.requests] == [prompt]

    def test_failed_job_does_not_stop_others(
        self, tmp_path: Path, api: list[str], capsys: pytest.CaptureFixture[str]
    ) -> None:
        file = self.write(tmp_path, '{"prompt": "a", "temperature": 9}', '{"prompt": "b"}')
        assert run(["submit", *file, *api]) == 1
        output = capsys.readouterr()
        refused, done = map(json.loads, output.out.splitlines())
        assert "temperature" in refused["error"]["message"]
        assert done == DOCUMENT
        assert output.err == "metaswarm: 1 of 2 jobs failed: see their lines\n"

    @pytest.mark.parametrize(("fault", "says"), [("cut", "is incomplete"), ("crash", "connection")])
    def test_broken_answer_costs_its_job_only(
        self,
        fault: str,
        says: str,
        tmp_path: Path,
        api: list[str],
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        end, calls = CompletionWriter.end, itertools.count()

        def break_first(writer: CompletionWriter, outcome: Outcome) -> bytes:
            if next(calls) > 0:
                return end(writer, outcome)
            if fault == "crash":
                raise RuntimeError(fault)
            return b""

        monkeypatch.setattr(CompletionWriter, "end", break_first)
        file = self.write(tmp_path, *(json.dumps({"prompt": word}) for word in "abc"))
        output = tmp_path / "answers.jsonl"
        command = ["submit", *file, "--output", str(output), "--concurrency", "1", *api]
        assert run(command) == 1
        errors = capsys.readouterr().err
        assert "line 1: " in errors
        assert says in errors
        assert "1 of 3 jobs failed" in errors
        assert [json.loads(line)["line"] for line in output.read_text().splitlines()] == [2, 3]
        assert run(command) == 0

    def test_lost_node_ends_the_run(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        file = self.write(tmp_path, '{"prompt": "a", "model": "tiny"}', '{"prompt": "b", "model": "tiny"}')
        assert run(["submit", *file, "--api", "127.0.0.1:1"]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("metaswarm: no node answers at http://127.0.0.1:1")

    @pytest.mark.parametrize("code", [JobErrorCode.FULL, JobErrorCode.MEASURING])
    def test_retries_while_peers_full_or_quality_measured(
        self,
        tmp_path: Path,
        node: FakeNode,
        api: list[str],
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
        code: JobErrorCode,
    ) -> None:
        monkeypatch.setattr("node.cli.submit_file.RETRY_JITTER", (0.0, 0.0))
        node.submitter.refuse = JobError(code, "not now", retry_after_s=2)
        node.submitter.refusals = 2
        assert run(["submit", *self.write(tmp_path, '{"prompt": "a"}'), *api]) == 0
        assert self.documents(capsys) == [DOCUMENT]
        assert len(node.submitter.requests) == 3

    def test_retry_deadline(
        self,
        tmp_path: Path,
        node: FakeNode,
        api: list[str],
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr("node.cli.submit_file.RETRY_TIMEOUT_S", 0.0)
        monkeypatch.setattr("node.cli.submit_file.RETRY_JITTER", (0.0, 0.0))
        node.submitter.refuse = JobError(JobErrorCode.FULL, "no room now", retry_after_s=2)
        assert run(["submit", *self.write(tmp_path, '{"prompt": "a"}'), *api]) == 1
        [document] = self.documents(capsys)
        assert document["error"] == {"message": "no room now", "code": "peers_full"}

    @pytest.mark.parametrize(
        ("line", "says"),
        [
            ("{", "not valid JSON"),
            ('{"prompt": "Hi", "temperature": NaN}', "NaN is not a number in JSON"),
            ("[]", '"prompt"'),
            ('{"text": "a"}', '"prompt"'),
            ('{"prompt": "a", "chats": 1}', "chats"),
        ],
    )
    def test_invalid_line_fails_before_any_job(
        self, tmp_path: Path, line: str, says: str, node: FakeNode, api: list[str], capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert run(["submit", *self.write(tmp_path, '{"prompt": "a"}', line), *api]) == 2
        error = capsys.readouterr().err
        assert "line 2" in error
        assert says in error
        assert node.submitter.requests == []

    def test_output_goes_on_where_it_was(
        self, tmp_path: Path, node: FakeNode, api: list[str], capsys: pytest.CaptureFixture[str]
    ) -> None:
        file = self.write(tmp_path, *(json.dumps({"prompt": word}) for word in "abcd"))
        output = tmp_path / "answers.jsonl"
        command = ["submit", *file, "--output", str(output), "--concurrency", "1", *api]
        node.submitter.refuse = JobError(JobErrorCode.FAILED, "a stage failed")
        node.submitter.refusals = 1
        assert run(command) == 1
        errors = capsys.readouterr().err
        assert "line 1: a stage failed" in errors
        assert "1 of 4 jobs failed: the same command tries them again" in errors
        written = output.read_text().splitlines()
        assert [json.loads(line)["line"] for line in written] == [2, 3, 4]
        output.write_text("".join(f"{line}\n" for line in written[:2]) + written[2][:20])  # a kill in the middle
        node.submitter.requests.clear()
        node.submitter.refuse = None
        assert run(command) == 0
        assert [job.prompt for job in node.submitter.requests] == ["a", "d"]
        answers = [json.loads(line) for line in output.read_text().splitlines()]
        assert [answer.pop("line") for answer in answers] == [1, 2, 3, 4]
        assert [{name: answer[name] for name in DOCUMENT} for answer in answers] == [DOCUMENT] * 4
        assert run(command) == 0
        assert len(node.submitter.requests) == 2

    def test_output_that_ends_inside_a_character(self, tmp_path: Path, node: FakeNode, api: list[str]) -> None:
        file = self.write(tmp_path, '{"prompt": "a"}', '{"prompt": "b"}')
        output = tmp_path / "answers.jsonl"
        command = ["submit", *file, "--output", str(output), *api]
        assert run(command) == 0
        written = output.read_bytes()
        output.write_bytes(written[: written.rindex("ö".encode()) + 1])
        assert run(command) == 0
        assert output.read_bytes() == written
        assert [job.prompt for job in node.submitter.requests[2:]] == ["b"]

    def test_output_that_cannot_be_written_is_said_before_any_job(
        self, tmp_path: Path, node: FakeNode, api: list[str], capsys: pytest.CaptureFixture[str]
    ) -> None:
        output = tmp_path / "none" / "answers.jsonl"
        assert run(["submit", *self.write(tmp_path, '{"prompt": "a"}'), "--output", str(output), *api]) == 1
        assert capsys.readouterr().err == f"metaswarm: cannot write {output}: No such file or directory\n"
        assert node.submitter.requests == []

    def test_answer_that_could_not_be_written_is_not_counted(
        self, tmp_path: Path, api: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        def disk_is_full(descriptor: int) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, "fsync", disk_is_full)
        output = tmp_path / "answers.jsonl"
        assert run(["submit", *self.write(tmp_path, '{"prompt": "a"}'), "--output", str(output), *api]) == 1
        errors = capsys.readouterr().err
        assert "No space left" in errors
        assert "0 of 1 answers are in" in errors

    @pytest.mark.parametrize("text", ["notes of a year\n", "[1]\n", '{"line": 1}\n', "notes"])
    def test_output_of_something_else_is_left_alone(
        self, text: str, tmp_path: Path, node: FakeNode, api: list[str], capsys: pytest.CaptureFixture[str]
    ) -> None:
        output = tmp_path / "notes"
        output.write_text(text)
        assert run(["submit", *self.write(tmp_path, '{"prompt": "a"}'), "--output", str(output), *api]) == 1
        assert "choose another file" in capsys.readouterr().err
        assert (output.read_text(), node.submitter.requests) == (text, [])

    def test_output_of_other_prompts_is_refused(
        self, tmp_path: Path, api: list[str], capsys: pytest.CaptureFixture[str]
    ) -> None:
        output = ["--output", str(tmp_path / "answers.jsonl")]
        assert run(["submit", *self.write(tmp_path, '{"prompt": "a"}'), *output, *api]) == 0
        for changed in (["--max-tokens", "9"], ["--temperature", "1"]):
            assert run(["submit", *self.write(tmp_path, '{"prompt": "a"}'), *output, *changed, *api]) == 1
            assert "answers other prompts or options, first in line 1" in capsys.readouterr().err

    def test_ctrl_c_loses_no_answer(self, tmp_path: Path, node: FakeNode, serve: ServeNode) -> None:
        class StuckSubmitter(FakeSubmitter):
            async def _events(self, request: JobRequest) -> AsyncGenerator[JobEvent, None]:
                self.hang = len(self.requests) == 3
                async for event in super()._events(request):
                    yield event

        node.submitter = StuckSubmitter()
        output = tmp_path / "answers.jsonl"
        file = self.write(tmp_path, *(json.dumps({"prompt": word}) for word in "abcd"))
        command = ["submit", *file, "--output", str(output), "--concurrency", "1", "--api", serve(node)]
        with on_terminal(*command) as terminal:
            terminal.wait_for("50%")
            terminal.type("\x03")
            assert terminal.wait_exit() == 130
        assert "2 of 4 answers are in" in terminal.text
        assert "Traceback" not in terminal.text
        assert run(command) == 0
        assert [job.prompt for job in node.submitter.requests[3:]] == ["c", "d"]
        assert len(output.read_text().splitlines()) == 4


TRACE = {
    "stages": [
        {"peer": PEERS[0], "start": 0, "end": 4, "clock_error_s": 0.0005},
        {"peer": PEERS[1], "start": 4, "end": 8, "clock_error_s": 0.001},
    ],
    "rounds": [
        {
            "position": 5 + number,
            "tokens": 1,
            "arrived_s": 0.2 + 0.03 * number,
            "has_prompt": number == 0,
            "stages": [
                {"stage": 0, "link_s": 0.001, "queue_s": 0.0, "compute_s": 0.012, "serialise_s": 0.0005},
                {"stage": 1, "link_s": 0.002, "queue_s": 0.003, "compute_s": 0.01, "serialise_s": 0.0005},
            ],
        }
        for number in range(3)
    ],
    "dropped_steps": 0,
}


def test_trace_shows_medians_of_every_stage(
    node: FakeNode, api: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    described = describe_job(make_result("x", (1,))) | {"trace": TRACE}
    monkeypatch.setattr("node.api.openai.answers.describe_job", lambda result: described)
    assert run(["submit", "Hi", "--trace", *api]) == 0
    assert node.submitter.requests[0].trace
    output = capsys.readouterr()
    assert output.out == "Hello, wörld\n"
    rows = [line.split() for line in output.err.splitlines()]
    first, second = (next(row for row in rows if peer[-8:] in row) for peer in PEERS)
    assert first[2:] == ["0-4", "1.00/1.00", "0.00/0.00", "12.0/12.0", "0.50/0.50", "13.5/13.5"]
    assert second[-1] == "15.5/15.5"
    assert next(row for row in rows if row and row[0] == "all")[-1] == "29.0/29.0"
    assert run(["submit", "Hi", "--trace", "--json", *api]) == 0
    assert json.loads(capsys.readouterr().out)["trace"] == TRACE


def test_trace_of_stages_that_report_none(api: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["submit", "Hi", "--trace", *api]) == 0
    assert "no trace" in capsys.readouterr().err


def test_ctrl_c_cancels_job(node: FakeNode, serve: ServeNode) -> None:
    node.submitter.hang = True
    command = [sys.executable, "-m", "node", "submit", "Hi", "--api", serve(node)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.read(5) == b"Hello"
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=10)
    assert process.returncode == 130
    assert b"Traceback" not in errors
    assert node.submitter.left.is_set()
