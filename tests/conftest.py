"""What holds for all tests."""

import os
import signal
from collections.abc import Callable
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from node.util.offload import run_inline

# Daemons of tests that run at the same time, and the user's own node, must not find each other.
os.environ["METASWARM_NO_MDNS"] = "1"

# Hundreds of processes that tests start would compile the whole package, each of them anew.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

# Started in the background by a shell, tests ignore Ctrl-C, and so would the programs that they start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

SLOW = (
    "tests/unit/capabilities/test_measure.py",
    "tests/unit/cli/test_demo.py",
    "tests/unit/cli/test_evaluate.py",
    "tests/unit/engine/",
    "tests/unit/coordinator/test_disconnects.py",
    "tests/unit/stages/test_draft_model.py",
    "tests/unit/coordinator/test_sampling.py",
    "tests/unit/stages/test_hostile_peers.py",
    "tests/unit/coordinator/test_methods.py",
    "tests/unit/coordinator/test_failover.py",
    "tests/unit/coordinator/test_stragglers.py",
    "tests/unit/coordinator/test_trial_runner.py",
    "tests/unit/models/test_demo_model.py",
    "tests/unit/models/test_gguf_import.py",
    "tests/unit/models/test_hub.py",
    "tests/unit/models/test_importer.py",
    "tests/unit/models/test_tokenizer_service.py",
    "tests/unit/network/",
    "tests/unit/selection/",
    "tests/unit/selector/test_training_set.py",
    "tests/unit/selector/test_selectors.py",
    "tests/unit/test_demo.py",
    "tests/unit/doctor/test_diagnose.py",
    "tests/unit/stages/test_span_supervisor.py",
    "tests/unit/test_start.py",
    "tests/unit/util/test_child_process.py",
)
"""Where the unit tests are that take most of the time: they load torch, train models, start processes or run swarms."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the slow tests, which `make test-fast` leaves out."""
    for item in items:
        if item.nodeid.startswith(SLOW):
            item.add_marker(pytest.mark.slow)


@pytest.fixture
def virtual_clock(monkeypatch: pytest.MonkeyPatch) -> MockClock:
    """A clock that jumps to the next deadline; `trio.to_thread.run_sync` runs inline for the length of the test.

    With pytest-trio's own `autojump_clock` time would jump while all tasks wait for a thread.
    """

    async def run_sync(work: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        return await run_inline(lambda: work(*arguments))

    monkeypatch.setattr(trio.to_thread, "run_sync", run_sync)
    return MockClock(autojump_threshold=0)
