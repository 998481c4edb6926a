"""docs/http-api.md against the code: endpoints, fields of requests and answers, error codes."""

import re
from pathlib import Path
from typing import Any, is_typeddict

import pytest
from starlette.applications import Starlette
from starlette.routing import Route

from node.api import bench, explanation, interface
from node.api.access import Access
from node.api.anthropic import requests as anthropic
from node.api.application import make_app
from node.api.bench import describe_trial
from node.api.errors import ApiError
from node.api.guard import Guard
from node.api.job_document import describe_job
from node.api.measured import Measured
from node.api.ollama import requests as ollama
from node.api.openai import embeddings, messages, requests, responses
from node.api.request_id import RequestIds
from node.api.shared_fields import EXTENSIONS
from node.coordinator.submission import JobError, JobErrorCode
from node.coordinator.trial import MethodTrial, Trial
from selector.task import BASELINE
from tests.unit.api.fakes import FakeNode, make_result

ROOT = Path(__file__).parents[3]
TEXT = (ROOT / "docs/http-api.md").read_text(encoding="utf-8")
DOCUMENTS = {name: each for name, each in vars(interface).items() if is_typeddict(each)}


def section(heading: str) -> str:
    """Return the text below a heading, up to the next one of any level."""
    match = re.search(rf"^#+ {re.escape(heading)}\n(.*?)(?=^#|\Z)", TEXT, re.MULTILINE | re.DOTALL)
    assert match, heading
    return match[1]


def rows(heading: str) -> list[list[str]]:
    """Return the cells of a section's tables, without their heads."""
    lines = [line for line in section(heading).splitlines() if line.startswith("| `")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def names(text: str) -> list[str]:
    return re.findall(r"`([A-Za-z_][A-Za-z_0-9]*)`", text)


def first_column(heading: str) -> set[str]:
    return {name for row in rows(heading) for name in names(row[0])}


def test_lists_every_endpoint() -> None:
    app = make_app(FakeNode(), Access())
    assert isinstance(app, RequestIds)
    assert isinstance(app.app, Measured)
    assert isinstance(app.app.app, Guard)
    starlette = app.app.app._app
    assert isinstance(starlette, Starlette)
    served = set()
    for route in starlette.routes:
        assert isinstance(route, Route)
        path = route.path.replace(":path", "")
        served |= {f"{method} {path}" for method in route.methods or () if method != "HEAD"}
    listed = set(re.findall(r"^\| `((?:GET|POST|DELETE) [^`]+)`", TEXT, re.MULTILINE))
    assert listed == served


def test_lists_every_field_of_completions() -> None:
    implemented = requests.CHAT.implemented | requests.COMPLETION.implemented
    assert first_column("Implemented fields") == implemented
    (options,) = (row[1] for row in rows("Implemented fields") if "`stream_options`" in row[0])
    assert set(names(options)) == requests.STREAM_OPTIONS.names
    assert first_column("Extensions") == EXTENSIONS.implemented
    assert set(names(section("Ignored fields"))) == requests.IGNORED


def test_lists_every_neutral_field() -> None:
    tables: dict[str, Any] = {
        "both": requests.NEUTRAL,
        "chat": {k: v for k, v in requests.NEUTRAL_FOR_CHAT.items() if k not in requests.NEUTRAL},
        "completions": {k: v for k, v in requests.NEUTRAL_FOR_COMPLETION.items() if k not in requests.NEUTRAL},
        "message": messages.NEUTRAL_IN_MESSAGE,
    }
    lines = [line.split("|") for line in section("Neutral fields").splitlines() if line.startswith("| ")][1:]
    assert [cells[1].strip() for cells in lines] == list(tables)
    for _, where, fields, _ in lines:
        outside_values = re.sub(r"\([^)]*\)", "", fields)
        assert set(names(outside_values)) == tables[where.strip()].keys()


@pytest.mark.parametrize(
    ("heading", "implemented", "others", "options"),
    [
        ("Responses", responses.RESPONSE.implemented, responses.IGNORED | responses.NEUTRAL.keys(), set()),
        ("Embeddings", embeddings.EMBEDDING.implemented, embeddings.NEUTRAL.keys(), set()),
        ("Anthropic", anthropic.MESSAGE_REQUEST.implemented, anthropic.IGNORED | anthropic.NEUTRAL.keys(), set()),
        (
            "Ollama",
            ollama.CHAT.implemented | ollama.GENERATE.implemented,
            ollama.NEUTRAL.keys()
            | ollama.NEUTRAL_FOR_CHAT.keys()
            | ollama.IGNORED_FOR_TEXTS
            | ollama.IGNORED_OPTIONS
            | ollama.NEUTRAL_OPTIONS.keys(),
            ollama.OPTIONS.implemented,
        ),
    ],
)
def test_lists_every_field_of_other_protocols(
    heading: str, implemented: set[str], others: set[str], options: set[str]
) -> None:
    assert first_column(heading) == implemented
    _, _, rest = section(heading).partition("Ignored: ")
    assert set(names(rest.split("\n\n")[0].split(" Thinking ")[0])) == others
    if options:
        (listed,) = (row[1] for row in rows(heading) if row[0] == "`options`")
        assert set(names(listed)) == options


def test_lists_fields_of_explain_and_bench() -> None:
    assert first_column("Explain") == explanation.TASK.implemented
    table, answer = section("Bench").split("The answer has")
    request = [[cell.strip() for cell in line.split("|")] for line in table.splitlines() if line.startswith("| `")]
    assert {name for row in request for name in names(row[1])} == bench.BENCH.implemented
    (workload,) = (row[2] for row in request if row[1] == "`workload`")
    assert set(names(workload)) == bench.WORKLOAD.implemented
    document = describe_trial(Trial(baseline=MethodTrial(method=BASELINE), methods=[], observations=1))
    assert set(names(answer.split("\n\n")[0])) == document.keys()
    listed = {name for line in answer.splitlines() if line.startswith("| `") for name in names(line.split("|")[1])}
    assert listed == document["baseline"].keys()


def test_lists_every_field_of_the_answer() -> None:
    document = describe_job(make_result("text", (1,)))
    listed = {row[0].strip("`"): set(names(row[1])) for row in rows("Answer")}
    assert listed.keys() == document.keys()
    assert listed["route"] >= document["route"][0].keys()
    assert listed["consensus"] >= document["consensus"].keys() | document["consensus"]["votes"][0].keys()
    for name in ("method", "timing"):
        assert listed[name] >= document[name].keys()


@pytest.mark.parametrize("name", DOCUMENTS)
def test_lists_every_field_of_document(name: str) -> None:
    assert [row[0].strip("`") for row in rows(f"`{name}`")] == list(DOCUMENTS[name].__annotations__)


def test_lists_every_error_code_with_its_status() -> None:
    listed = {row[0].strip("`"): int(row[1]) for row in rows("Errors")}
    of_jobs = {code.value: ApiError.from_job_error(JobError(code, "")).status for code in JobErrorCode}
    assert {code: status for code, status in listed.items() if code in of_jobs} == of_jobs
    source = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "node/api").rglob("*.py"))
    of_api = set(re.findall(r'(?:code=|"code": )"(\w+)"', source))
    assert listed.keys() == of_jobs.keys() | of_api


@pytest.mark.parametrize("code", JobErrorCode)
def test_error_503_says_when_to_retry(code: JobErrorCode) -> None:
    error = ApiError.from_job_error(JobError(code, ""))
    assert (error.status == 503) == (error.headers is not None and "Retry-After" in error.headers)


def test_features_name_tests_that_exist() -> None:
    files = ("unit/api/test_clients.py", "unit/api/test_programs.py", "process/test_api.py")
    tests = "".join((ROOT / f"tests/{name}").read_text() for name in files)
    listed = re.findall(r"`(test_\w+)`", (ROOT / "docs/api-features.md").read_text(encoding="utf-8"))
    defined = re.findall(r"^async def (test_\w+)", tests, re.MULTILINE)
    assert sorted(listed) == sorted(defined), "every feature has its test, and every test its line"
