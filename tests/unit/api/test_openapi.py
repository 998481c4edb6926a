"""The OpenAPI description against the application: Schemathesis sends what it admits, and what it does not admit."""

import inspect
import re
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.checks import not_a_server_error
from schemathesis.config import SchemathesisConfig
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    ignored_auth,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)

from node.api import access, errors, guard
from node.api.access import Access
from node.api.application import make_app
from node.api.measured import Measured
from node.api.openapi.document import STATUSES, describe_api, operation_names
from node.api.openapi.operations import OPERATIONS
from node.api.request_id import RequestIds
from tests.unit.api.fakes import FakeNode, serve_in_thread

KEY = "a key"
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    negative_data_rejection,
    unsupported_method,
    ignored_auth,
]


def routes() -> Any:
    app = make_app(FakeNode(), Access())
    assert isinstance(app, RequestIds)
    assert isinstance(app.app, Measured)
    return app.app._routes


DOCUMENT = describe_api(routes())
CONFIG = SchemathesisConfig.from_dict({"phases": {"coverage": {"enabled": False}}})
SCHEMA = schemathesis.openapi.from_dict(DOCUMENT, config=CONFIG)


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with serve_in_thread(FakeNode(), KEY) as url:
        yield url


@SCHEMA.exclude(path="/swarm/events").parametrize()  # it does not end
@settings(
    max_examples=10,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
)
def test_every_answer_is_described(case: schemathesis.Case[Any], url: str) -> None:
    case.call_and_validate(base_url=url, headers={"Authorization": f"Bearer {KEY}"}, checks=CHECKS)


def test_description_is_served(url: str) -> None:
    answer = httpx.get(f"{url}/openapi.json", headers={"X-Api-Key": KEY})
    assert answer.json() == DOCUMENT
    assert httpx.get(f"{url}/openapi.json").status_code == 401


def test_every_route_is_described() -> None:
    names = operation_names(routes())
    assert set(names) <= OPERATIONS.keys(), "describe the route in node/api/openapi/operations.py"
    assert {f"{method.upper()} {path}" for path, item in DOCUMENT["paths"].items() for method in item} == set(names)
    for name in names:
        method, _, path = name.partition(" ")
        assert ("requestBody" in DOCUMENT["paths"][path][method.lower()]) == (method == "POST")


def test_references_lead_to_schemas() -> None:
    schemas = DOCUMENT["components"]["schemas"]

    def check(value: Any) -> None:
        if isinstance(value, dict):
            if isinstance(reference := value.get("$ref"), str):
                assert reference.removeprefix("#/components/schemas/") in schemas
            for each in value.values():
                check(each)
        elif isinstance(value, list):
            for each in value:
                check(each)

    check(DOCUMENT)
    assert schemas["NodeStatus"]["properties"]["uptime_s"] == {"type": "number"}


def test_every_status_of_the_code_is_described() -> None:
    statuses = {int(word) for module in (access, errors, guard) for word in _statuses(inspect.getsource(module))}
    assert statuses - {204} <= STATUSES.keys()


def _statuses(source: str) -> list[str]:
    return ["".join(found) for found in re.findall(r"ApiError\(\s*(\d{3})|JobErrorCode\.\w+: (\d{3}),", source)]
