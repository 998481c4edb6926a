"""Drives engines the way a job does: a prompt, then token by token, through all spans in order."""

import itertools
from collections.abc import Sequence

from node.engine.interface import Engine, SliceInput, StepResult
from node.engine.shard import Shard
from protocol.identity import BlockRange, JobId, SessionId
from protocol.messages import Sampling
from protocol.tensors import Tensor, tensor_from_tokens, tokens_from_tensor

GREEDY = Sampling(max_tokens=1)


def session(number: int) -> SessionId:
    return SessionId(JobId(f"{number:032x}"), 0)


def spans(block_count: int, count: int) -> list[BlockRange]:
    """Cut blocks into nearly equal spans."""
    edges = [block_count * edge // count for edge in range(count + 1)]
    return [BlockRange(start, end) for start, end in itertools.pairwise(edges)]


class InProcess:
    """Gives a Shard, which computes at once, the calls of an Engine."""

    def __init__(self, shard: Shard) -> None:
        self.info = shard.info
        self._shard = shard

    async def open(self, session: SessionId, positions: int, sampling: Sampling | None) -> None:
        self._shard.open(session, positions, sampling)

    async def step(self, slices: Sequence[SliceInput]) -> StepResult:
        return self._shard.step(slices)

    async def close(self, session: SessionId) -> None:
        self._shard.close(session)


AnyEngine = Engine | InProcess


async def step(engines: Sequence[AnyEngine], of: SessionId, position: int, tokens: Sequence[int], draws: int) -> Tensor:
    """Take tokens through all spans; return what the last one gives."""
    rows = tensor_from_tokens(tokens)
    for engine in engines:
        result = await engine.step([SliceInput(session=of, position=position, tensor=rows, draws=draws)])
        rows = result.outputs[0].tensor
    return rows


async def decode(
    engines: Sequence[AnyEngine],
    prompt: Sequence[int],
    count: int,
    *,
    of: SessionId | None = None,
    chunk: int | None = None,
    sampling: Sampling = GREEDY,
) -> list[int]:
    """Open a session, take the prompt through in chunks of `chunk` rows, draw `count` tokens, and close it."""
    of = of or session(0)
    for engine in engines:
        await engine.open(of, len(prompt) + count, sampling)
    chunk = chunk or len(prompt)
    for start in range(0, len(prompt), chunk):
        part = prompt[start : start + chunk]
        last = start + chunk >= len(prompt)
        rows = await step(engines, of, start, part, 1 if last else 0)
    tokens = tokens_from_tensor(rows)
    while len(tokens) < count:
        rows = await step(engines, of, len(prompt) + len(tokens) - 1, tokens[-1:], 1)
        tokens += tokens_from_tensor(rows)
    for engine in engines:
        await engine.close(of)
    return tokens
