"""The Python client as a package: what it needs, and that its documents are the node's."""

import inspect
import subprocess
import sys
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

import pytest

from metaswarm_client import AsyncSwarm, Swarm, answers, swarm_documents
from metaswarm_client.options import ChatOptions, JobOptions, TaskOptions
from node.api import explanation, interface
from node.api.job_document import describe_job
from node.api.openai import requests
from node.api.shared_fields import EXTENSIONS
from tests.unit.api.fakes import make_result

ROOT = Path(__file__).parents[3]
IMPORT = """
import sys, httpx, anyio
before = set(sys.modules)
import metaswarm_client
print(sorted({name.partition(".")[0] for name in set(sys.modules) - before} - sys.stdlib_module_names))
"""
NAMES = {"Model": "ModelDocument", "Peer": "PeerStatus", "Span": "SpanSummary", "Gap": "GapDocument"}
NAMES["Ban"] = "BanDocument"


def test_needs_nothing_but_httpx_and_anyio() -> None:
    result = subprocess.run([sys.executable, "-c", IMPORT], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "['metaswarm_client']"


DOCUMENTS = [
    each
    for name, each in vars(swarm_documents).items()
    if is_dataclass(each) and each is not answers.Stage and not name.startswith("_")
]


@pytest.mark.parametrize("kind", DOCUMENTS)
def test_documents_are_the_nodes(kind: type[Any]) -> None:
    document = getattr(interface, NAMES.get(kind.__name__, kind.__name__))
    assert {field.name for field in fields(kind)} <= get_type_hints(document).keys()


def test_job_is_the_nodes() -> None:
    document = describe_job(make_result("text", (1,)))
    assert {field.name for field in fields(answers.Job)} == document.keys()
    assert {field.name for field in fields(answers.Stage)} == document["route"][0].keys()
    for name, kind in (("method", answers.Method), ("consensus", answers.Consensus), ("timing", answers.Timing)):
        assert {field.name for field in fields(kind)} == document[name].keys()


def test_options_are_fields_of_the_api() -> None:
    renamed = {"schema", "extra"} | EXTENSIONS.implemented
    common = requests.CHAT.implemented & requests.COMPLETION.implemented
    assert JobOptions.__annotations__.keys() - renamed <= common
    assert get_type_hints(ChatOptions).keys() - renamed <= requests.CHAT.implemented
    assert TaskOptions.__annotations__.keys() == explanation.TASK.implemented


def test_both_clients_have_the_same_methods() -> None:
    def methods(kind: type[Any]) -> dict[str, list[tuple[str, Any]]]:
        public = {name: each for name, each in vars(kind).items() if not name.startswith("_")}
        public.pop("close", None), public.pop("aclose", None)
        return {
            name: [(each.name, each.default) for each in inspect.signature(function).parameters.values()]
            for name, function in public.items()
        }

    assert methods(Swarm) == methods(AsyncSwarm)
