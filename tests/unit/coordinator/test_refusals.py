"""What the client of a job without a route is told."""

from types import SimpleNamespace
from typing import cast

import pytest

from node.coordinator.job import Job
from node.coordinator.refusals import no_route
from protocol.identity import BlockRange
from protocol.measurements import TaskKind
from selector.routing import NoRouteError


@pytest.mark.parametrize(
    ("unreached", "told"),
    [
        ((), "no peer serves blocks 3-6 of tiny: start a node with --serve"),
        (("far",), "no peer that this node can reach serves blocks 3-6 of tiny (announced by far)"),
    ],
)
def test_blocks_of_peers_that_cannot_be_reached_are_told_from_those_that_nobody_serves(
    unreached: tuple[str, ...], told: str
) -> None:
    request = SimpleNamespace(budget=None)
    job = SimpleNamespace(model=SimpleNamespace(name="tiny"), admitted=(), kind=TaskKind.GENERATE, request=request)
    error = NoRouteError([BlockRange(3, 6)])
    error.unreached = unreached
    assert str(no_route(cast("Job", job), error, {}, {})).startswith(told)
