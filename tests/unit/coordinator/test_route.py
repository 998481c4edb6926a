"""The coordinator's end of a route, by itself."""

from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import Mock

import numpy as np
import pytest
import trio

from node.coordinator.route import OpenRoute, RouteLost
from node.coordinator.route_output import SampledToken
from node.coordinator.submission import JobError, JobErrorCode
from protocol.identity import BlockRange, JobId, PeerId, SessionId, Stage
from protocol.messages import Sampling, Slice
from protocol.tensors import DType, Tensor, tensor_from_tokens

PEER = PeerId("a")


def tensor_of(*row: float) -> Tensor:
    """Return one row of log probabilities."""
    return Tensor(DType.FLOAT32, (1, len(row)), np.array(row, np.float32).tobytes())


async def test_token_after_a_stall_is_dropped() -> None:
    opening = SimpleNamespace(sampling=Sampling(max_tokens=4), vocabulary_size=10)
    route = OpenRoute([Stage(PEER, BlockRange(0, 9))], Mock(peer_id=PEER), cast("Any", opening))
    link = cast("Any", Mock(peer=PEER))
    session = SessionId(JobId("00" * 16), 1)
    route.receive(Slice(session=session, position=9, rows=1), tensor_from_tokens([7]), link)
    route.stall(JobError(JobErrorCode.UNCOVERED, "no progress"))
    route.receive(Slice(session=session, position=10, rows=1), tensor_from_tokens([7]), link)
    with trio.fail_after(1):
        output = await route.next_output()
        assert isinstance(output, SampledToken)
        assert output.token == 7
        with pytest.raises(JobError, match="no progress"):
            await route.next_output()


async def test_a_stage_that_draws_before_the_prompt_is_sent_for_scoring_is_lost() -> None:
    sampling = Sampling(max_tokens=0, prompt_logprobs=True, prompt_length=5, logprobs=1)
    opening = SimpleNamespace(sampling=sampling, vocabulary_size=10)
    route = OpenRoute([Stage(PEER, BlockRange(0, 9))], Mock(peer_id=PEER), cast("Any", opening))
    row = np.array([[7, -0.5]], np.float32)
    part = Slice(session=SessionId(JobId("00" * 16), 1), position=5, rows=1)
    route.receive(part, Tensor(DType.FLOAT32, row.shape, row.tobytes()), cast("Any", Mock(peer=PEER)))
    with trio.fail_after(1), pytest.raises(RouteLost) as caught:
        await route.next_output()
    assert caught.value.session.blamed == PEER


@pytest.mark.parametrize(
    ("sampling", "tensor"),
    [
        (Sampling(max_tokens=4), tensor_from_tokens([3, 10])),
        (Sampling(max_tokens=4), tensor_from_tokens([-1])),
        (Sampling(max_tokens=4, logprobs=2), tensor_of(10, -0.5, 3, -0.5)),
        (Sampling(max_tokens=4, logprobs=2), tensor_of(3, -0.5, 10, -0.5)),
        (Sampling(max_tokens=0, prompt_logprobs=True, prompt_length=5, logprobs=2), tensor_of(1, -0.5, 10, -0.5)),
    ],
    ids=["drawn", "negative", "drawn with log probabilities", "likeliest", "likeliest of the prompt"],
)
async def test_a_stage_that_sends_a_token_outside_the_vocabulary_is_lost(sampling: Sampling, tensor: Tensor) -> None:
    opening = SimpleNamespace(sampling=sampling, vocabulary_size=10)
    route = OpenRoute([Stage(PEER, BlockRange(0, 9))], Mock(peer_id=PEER), cast("Any", opening))
    route._reader.begin([0, 1, 2, 3, 4])
    position = 1 if sampling.prompt_logprobs else 5
    part = Slice(session=SessionId(JobId("00" * 16), 1), position=position, rows=tensor.rows)
    route.receive(part, tensor, cast("Any", Mock(peer=PEER)))
    with trio.fail_after(1), pytest.raises(RouteLost) as caught:
        await route.next_output()
    assert caught.value.session.blamed == PEER
