"""The coordinator's end of a route, by itself."""

from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import Mock

import pytest
import trio

from node.coordinator.route import OpenRoute
from node.coordinator.route_output import SampledToken
from node.coordinator.submission import JobError, JobErrorCode
from protocol.identity import BlockRange, JobId, PeerId, SessionId, Stage
from protocol.messages import Sampling, Slice
from protocol.tensors import tensor_from_tokens

PEER = PeerId("a")


async def test_token_after_a_stall_is_dropped() -> None:
    opening = SimpleNamespace(sampling=Sampling(max_tokens=4))
    route = OpenRoute([Stage(PEER, BlockRange(0, 9))], cast("Any", None), cast("Any", opening))
    link = cast("Any", Mock(peer=PEER))
    session = SessionId(JobId("00" * 16), 1)
    route.receive(Slice(session=session, position=9, rows=1), tensor_from_tokens([7]), link)
    route.stall(JobError(JobErrorCode.UNCOVERED, "no progress"))
    route.receive(Slice(session=session, position=10, rows=1), tensor_from_tokens([7]), link)
    with trio.fail_after(1):
        assert await route.next_output() == SampledToken(7, None)
        with pytest.raises(JobError, match="no progress"):
            await route.next_output()
