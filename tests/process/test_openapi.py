"""The OpenAPI description against a real node with the demo model: Schemathesis sends what it admits, and what not.

The random seed of a run is printed; FUZZ_SEED repeats it, FUZZ_EXAMPLES says how many requests are
sent to each route.
"""

import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from anyio.from_thread import start_blocking_portal
from hypothesis import HealthCheck, seed, settings
from schemathesis.checks import not_a_server_error
from schemathesis.config import SchemathesisConfig
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from node.models.store import Package
from tests.process.daemons import MODEL, running_daemon
from tests.unit.api.test_openapi import DOCUMENT

SEED = int(os.environ.get("FUZZ_SEED", secrets.randbelow(1 << 32)))
EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "500"))
CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
"""Whether what is not admitted is refused is known of the fake node: here less is admitted than the node does."""

KEY = "a-key"
ENDLESS = "/swarm/(events|bench)"
"""What does not end, or takes minutes to measure."""

MOST_ITEMS = 4
FEW: dict[str, Any] = {"type": "integer", "minimum": 1, "maximum": 4}
LIMITS = dict.fromkeys(
    ("max_tokens", "max_completion_tokens", "max_output_tokens", "num_predict", "min_tokens", "n"), FEW
)


def about_the_model(value: Any) -> Any:
    """Return a description of fewer requests: they name the model, and their texts and lists are short."""
    if isinstance(value, list):
        return [about_the_model(each) for each in value]
    if not isinstance(value, dict):
        return value
    narrowed = {key: about_the_model(each) for key, each in value.items()}
    if "maxItems" in narrowed:
        narrowed["maxItems"] = min(narrowed["maxItems"], MOST_ITEMS)
    if isinstance(properties := narrowed.get("properties"), dict):
        limits = {name: limit for name, limit in LIMITS.items() if name in properties}
        narrowed["properties"] = properties | limits | ({"model": {"enum": [MODEL]}} if "model" in properties else {})
        narrowed["required"] = sorted({*narrowed.get("required", []), *limits})
    return narrowed


def narrowed_operation(operation: dict[str, Any]) -> dict[str, Any]:
    body = operation.get("requestBody")
    return operation | ({"requestBody": about_the_model(body)} if body else {})


def narrowed_document() -> dict[str, Any]:
    items = DOCUMENT["paths"].items()
    paths = {path: {method: narrowed_operation(each) for method, each in item.items()} for path, item in items}
    return DOCUMENT | {"paths": paths}


SCHEMA = schemathesis.openapi.from_dict(narrowed_document(), config=SchemathesisConfig.from_dict({}))


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory, package: Package) -> Iterator[str]:
    folder: Path = tmp_path_factory.mktemp("openapi")
    print(f"FUZZ_SEED={SEED}")
    with start_blocking_portal("trio") as portal:
        node = running_daemon(folder / "node", "--serve", MODEL, "--api-key", KEY)
        with portal.wrap_async_context_manager(node) as daemon:
            yield daemon.api_url


@pytest.mark.soak
@SCHEMA.exclude(path_regex=ENDLESS).parametrize()
@seed(SEED)
@settings(max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=list(HealthCheck))
def test_every_answer_of_a_real_node_is_described(case: schemathesis.Case[Any], url: str) -> None:
    case.call_and_validate(base_url=url, headers={"Authorization": f"Bearer {KEY}"}, checks=CHECKS, timeout=120)
