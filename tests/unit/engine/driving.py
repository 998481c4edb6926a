"""Drives engines the way a job does: a prompt, then token by token, through all spans in order."""

import hashlib
import itertools
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from node.engine.base import Engine
from node.engine.interface import (
    PAGE_HASH_BYTES,
    PAGE_POSITIONS,
    REFERENCE,
    EngineError,
    KvCompatibilityKey,
    Prefix,
    SessionOptions,
    ShardSource,
    SliceInput,
    SpanInfo,
    StepResult,
    Variant,
)
from node.engine.kv_allocator import KvAllocator
from node.engine.memory_plan import reserve_bytes
from node.engine.shard import Shard
from protocol.identity import BlockRange, JobId, SessionId
from protocol.messages import Sampling
from protocol.tensors import Tensor, tensor_from_tokens, tokens_from_tensor

DEVICE = os.environ.get("METASWARM_TEST_DEVICE", "cpu")
"""What the engines of these tests compute on: `make gpu` has them repeated on a GPU."""

GREEDY = Sampling(max_tokens=1)


def session(number: int) -> SessionId:
    return SessionId(JobId(f"{number:032x}"), 0)


def spans(block_count: int, count: int) -> list[BlockRange]:
    """Cut blocks into nearly equal spans."""
    edges = [block_count * edge // count for edge in range(count + 1)]
    return [BlockRange(start, end) for start, end in itertools.pairwise(edges)]


def pages_of(text: Sequence[int]) -> Prefix:
    pages = (repr(text[:end]).encode() for end in range(PAGE_POSITIONS, len(text) + 1, PAGE_POSITIONS))
    hashes = b"".join(hashlib.blake2b(page, digest_size=PAGE_HASH_BYTES).digest() for page in pages)
    return Prefix(namespace="me", hashes=hashes)


def memory_for(source: ShardSource, info: SpanInfo, positions: int, device: str = DEVICE) -> int:
    """Return the memory limit that leaves a span so many positions' worth beside its weights."""
    reserve = 0 if device == "cpu" else reserve_bytes(source.config, is_last=info.blocks.end == info.block_count)
    return info.weight_bytes + positions * info.kv_bytes_per_position + reserve


class InProcess:
    """Gives a Shard, which computes at once, the calls of an Engine, also without waiting."""

    def __init__(self, shard: Shard[Any]) -> None:
        self.info = shard.info
        self.shard = shard
        self.pages = KvAllocator(shard.info)

    def open_now(self, session: SessionId, positions: int, options: SessionOptions | None = None) -> None:
        self.pages.open(session, positions, None)
        self.begin_now(session, options or self.options(GREEDY))

    def options(self, sampling: Sampling) -> SessionOptions:
        return SessionOptions(variant=REFERENCE, sampling=sampling if self.info.is_last else None)

    def begin_now(self, session: SessionId, options: SessionOptions) -> int:
        placement = self.pages.begin(session, options)
        self.shard.begin(session, options, placement)
        return placement.cached

    def step_now(self, slices: Sequence[SliceInput]) -> StepResult:
        try:
            for rows in slices:
                if rows.session in self.pages:
                    self.pages.rewind(rows.session, rows.position)
            result = self.shard.step(slices)
        except EngineError:
            for rows in slices:
                self.close_now(rows.session, keep=False)
            raise
        failed = {fault.session for fault in result.faults}
        for rows in slices:
            if rows.session in failed:
                self.close_now(rows.session, keep=False)
            else:
                self.pages.advance(rows.session, rows.position + rows.tensor.rows)
        return result

    def close_now(self, session: SessionId, *, keep: bool = True) -> None:
        self.pages.close(session, keep=keep)
        self.shard.close(session)

    def trim_now(self) -> None:
        self.shard.trim(self.pages.take_dropped(), idle=not self.pages)

    def variants(self) -> frozenset[Variant]:
        return self.shard.variants()

    async def prepare(self, variant: Variant) -> None:
        self.shard.prepare(variant)

    async def open(
        self, session: SessionId, positions: int, prefix: Prefix | None = None
    ) -> Mapping[KvCompatibilityKey, int]:
        return self.pages.open(session, positions, prefix)

    async def begin(self, session: SessionId, options: SessionOptions) -> int:
        return self.begin_now(session, options)

    async def step(self, slices: Sequence[SliceInput]) -> StepResult:
        return self.step_now(slices)

    async def close(self, session: SessionId) -> None:
        self.close_now(session)


class Part:
    """A part of an engine's span, as if it were one of its own; several of one engine are sessions of their own."""

    def __init__(self, engine: "Engine | InProcess", blocks: BlockRange) -> None:
        self.info = engine.info.part(blocks)
        self._engine = engine

    def _of(self, session: SessionId) -> SessionId:
        return SessionId(session.job, self.info.blocks.start)

    async def open(
        self, session: SessionId, positions: int, prefix: Prefix | None = None
    ) -> Mapping[KvCompatibilityKey, int]:
        return await self._engine.open(self._of(session), positions, prefix)

    async def begin(self, session: SessionId, options: SessionOptions) -> int:
        return await self._engine.begin(self._of(session), replace(options, blocks=self.info.blocks))

    async def step(self, slices: Sequence[SliceInput]) -> StepResult:
        return await self._engine.step([replace(rows, session=self._of(rows.session)) for rows in slices])

    async def close(self, session: SessionId) -> None:
        await self._engine.close(self._of(session))


async def start(
    engine: "AnyEngine",
    session: SessionId,
    positions: int,
    sampling: Sampling = GREEDY,
    *,
    variant: Variant = REFERENCE,
    activations: str = "fp32",
) -> None:
    """Open a session and begin it."""
    await engine.open(session, positions)
    sampling_here = sampling if engine.info.is_last else None
    await engine.begin(session, SessionOptions(sampling=sampling_here, variant=variant, activations=activations))


AnyEngine = Engine | InProcess | Part


async def step(
    engines: Sequence[AnyEngine],
    of: SessionId,
    position: int,
    tokens: Sequence[int],
    draws: int,
    *,
    drafts: tuple[int, ...] = (),
    history: Sequence[int] | None = None,
) -> Tensor:
    """Take tokens through all spans; return what the last one gives."""
    rows = tensor_from_tokens(tokens)
    for engine in engines:
        part = SliceInput(session=of, position=position, tensor=rows, draws=draws)
        if engine.info.is_last:
            part = replace(part, drafts=drafts, history=history)
        result = await engine.step([part])
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
    variant: Variant = REFERENCE,
    activations: str = "fp32",
) -> list[int]:
    """Open a session, take the prompt through in chunks of `chunk` rows, draw `count` tokens, and close it."""
    of = of or session(0)
    for engine in engines:
        await start(engine, of, len(prompt) + count, sampling, variant=variant, activations=activations)
    chunk = chunk or len(prompt)
    for position in range(0, len(prompt), chunk):
        part = prompt[position : position + chunk]
        last = position + chunk >= len(prompt)
        rows = await step(engines, of, position, part, 1 if last else 0, history=list(prompt) if last else None)
    tokens = tokens_from_tensor(rows)
    while len(tokens) < count:
        rows = await step(engines, of, len(prompt) + len(tokens) - 1, tokens[-1:], 1)
        tokens += tokens_from_tensor(rows)
    for engine in engines:
        await engine.close(of)
    return tokens
