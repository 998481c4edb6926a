"""Speed of the llama.cpp engine beside llama.cpp itself, with the demo model's GGUF file.

    python -m benchmarks.llamacpp [--json] [--rounds N] [--tokens N] [--threads N] [--workload NAME …]

Prefill of 512 tokens, then decoding at batch 1, 8 and 32 behind 64 tokens, and at batch 1 behind 1,536 (`long`), in
turn: `llama.cpp` is its own loop over the whole published file, in a process of its own with its default parameters and
OpenMP's; `ours` the engine of one span, in this process; `ours q8_0` the same with keys and values in q8_0; `3 workers`
a pipeline of three worker processes with a third of the blocks and this many threads each. `over llama.cpp`: rates over
its own, 1 where they are as fast. Other processes on the machine disturb the figures less than their ratios.
"""

import argparse
import ctypes
import json
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import trio

from node.engine.base import Engine
from node.engine.client import start_worker
from node.engine.interface import EngineOptions, SessionOptions, ShardSource, SliceInput, Variant
from node.engine.kv_allocator import KvAllocator
from node.engine.llamacpp.library import Batch, Library, load_library
from node.engine.llamacpp.shard import LLAMACPP, LlamaShard
from node.models.gguf_config import read_config
from node.models.gguf_file import GgufModel, read_gguf
from node.models.gguf_package import arrange_package
from node.models.layout import GGUF, block_file, part_file
from node.util.priority import BRIEFLY_SPINNING_THREADS
from protocol.identity import BlockRange, JobId, ModelId, SessionId
from protocol.messages import Sampling
from protocol.tensors import tensor_from_tokens, tokens_from_tensor
from tests.support.demo_model import demo_gguf

PREFILL, CONTEXT, LONG, BATCHES, POSITIONS = 512, 64, 1536, (1, 8, 32), 8192

NARROW = Variant("llamacpp", "native", "q8_0")

Rows = tuple[int, int, Sequence[int]]
"""Of one text: its number, the position of its first token, and tokens."""

Step = Callable[[Sequence[Rows]], list[int]]
"""Takes rows of several texts, and returns the likeliest token after each."""

Measured = dict[str, float]
"""Milliseconds of a prefill, and of a step at each batch."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.llamacpp", description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=24, help="decoded in each round")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--workload", action="append", choices=tuple(WORKLOADS), help="by default all")
    options = parser.parse_args()
    if not BRIEFLY_SPINNING_THREADS.items() <= os.environ.items():  # OpenMP reads them when it is loaded
        command = [sys.executable, "-m", "benchmarks.llamacpp", *sys.argv[1:]]
        os.execve(sys.executable, command, os.environ | BRIEFLY_SPINNING_THREADS)  # as our workers have them
    plan = Plan(tuple(options.workload or WORKLOADS), options.tokens)
    milliseconds = trio.run(_measure, options.rounds, plan, options.threads)
    base = milliseconds["llama.cpp"]
    over = {name: {key: base[key] / row[key] for key in row} for name, row in milliseconds.items()}
    report = {"load": os.getloadavg()[0], "milliseconds": milliseconds, "over llama.cpp": over}
    if options.json:
        print(json.dumps(report))
        return
    print(f"{options.threads} threads, load average {report['load']:.1f}, medians in ms (rate over llama.cpp's)")
    for name, row in milliseconds.items():
        print(f"{name:12}" + "".join(f"{key:>10} {row[key]:8.1f} ({over[name][key]:.2f})" for key in row))


async def _measure(rounds: int, plan: "Plan", threads: int) -> dict[str, Measured]:
    model = read_gguf(demo_gguf())
    options = EngineOptions(threads=threads, kv_positions=POSITIONS)
    blocks = model.integer("block_count")
    with TemporaryDirectory() as folder:
        for name, part in arrange_package(model).parts.items():
            part.write(Path(folder) / name, lambda _count: None)
        whole = BlockRange(0, blocks)
        shard = LlamaShard(_source(model, Path(folder), whole), whole, options)
        runs: dict[str, Callable[[], Measured]] = {
            "llama.cpp": partial(_ask, _start_llama_cpp(model.paths[0], threads), plan),
            "ours": partial(_run, _Ours(shard, LLAMACPP).step, plan),
            "ours q8_0": partial(_run, _Ours(shard, NARROW).step, plan),
        }
        async with AsyncExitStack() as stack:
            thirds = [BlockRange(blocks * n // 3, blocks * (n + 1) // 3) for n in range(3)]
            workers = [
                await stack.enter_async_context(start_worker(_source(model, Path(folder), part), part, options))
                for part in thirds
            ]
            measured: dict[str, list[Measured]] = {}
            for number in range(rounds + 1):
                for name, run in runs.items():
                    one = run()
                    if number:  # the first warms up
                        measured.setdefault(name, []).append(one)
                one = await _run_workers(workers, plan)
                if number:
                    measured.setdefault("3 workers", []).append(one)
                print(f"round {number} of {rounds} done", file=sys.stderr)
    return {
        name: {key: statistics.median(one[key] for one in all_) for key in all_[0]} for name, all_ in measured.items()
    }


def _source(model: GgufModel, folder: Path, blocks: BlockRange) -> ShardSource:
    last = blocks.end == model.integer("block_count")
    return ShardSource(
        model=ModelId("ab" * 32),
        config=read_config(model),
        block_files={number: folder / block_file(number, GGUF) for number in range(blocks.start, blocks.end)},
        embed_file=folder / part_file("embed", GGUF) if blocks.start == 0 or last else None,
        head_file=folder / part_file("head", GGUF) if last else None,
        format=GGUF,
        common_file=folder / part_file("common", GGUF),
    )


WORKLOADS = {"prefill": (1, PREFILL), **{f"batch {batch}": (batch, CONTEXT) for batch in BATCHES}, "long": (1, LONG)}
"""How many texts, and the tokens of each before it is decoded."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What a round measures: workloads by name, and how many tokens are decoded."""

    workloads: Sequence[str]
    tokens: int


def _run(step: Step, plan: Plan) -> Measured:
    measured = {}
    for name in plan.workloads:
        (batch, length), count = WORKLOADS[name], plan.tokens
        started_s = time.perf_counter()
        drawn = step([(number, 0, _text(length, number)) for number in range(batch)])
        if name != "prefill":
            started_s = time.perf_counter()
            for position in range(length, length + count):
                drawn = step([(number, position, [token]) for number, token in enumerate(drawn)])
        steps = 1 if name == "prefill" else count
        measured[name] = (time.perf_counter() - started_s) / steps * 1e3
    return measured


class LlamaCpp:
    """llama.cpp's own loop over a file, as its users write it, with default parameters."""

    def __init__(self, library: Library, path: Path, threads: int) -> None:
        self._library = library
        model = library.llama_model_load_from_file(str(path).encode(), library.llama_model_default_params())
        parameters = library.llama_context_default_params()
        parameters.n_ctx, parameters.n_seq_max, parameters.n_outputs_max_per_seq = POSITIONS, max(BATCHES), PREFILL
        parameters.n_threads = parameters.n_threads_batch = threads
        parameters.kv_unified = True
        self._context = library.llama_init_from_model(model, parameters)
        self._vocabulary = library.llama_vocab_n_tokens(library.llama_model_get_vocab(model))

    def step(self, texts: Sequence[Rows]) -> list[int]:
        """Take rows of several texts, and return the likeliest token after each."""
        library, int32 = self._library, ctypes.c_int32
        memory = library.llama_get_memory(self._context)
        rows, ends = [], []
        for number, position, tokens in texts:
            if position == 0:
                library.llama_memory_seq_rm(memory, number, 0, -1)
            rows += [(token, position + index, number) for index, token in enumerate(tokens)]
            ends.append(len(rows) - 1)
        count = len(rows)
        numbers = [int32(number) for _, _, number in rows]
        batch = Batch(
            count,
            (int32 * count)(*(token for token, _, _ in rows)),
            None,
            (int32 * count)(*(position for _, position, _ in rows)),
            (int32 * count)(*[1] * count),
            (ctypes.POINTER(int32) * count)(*map(ctypes.pointer, numbers)),
            (ctypes.c_int8 * count)(*(index in ends for index in range(count))),
        )
        assert library.llama_decode(self._context, batch) == 0
        drawn = []
        for end in ends:
            logits = library.llama_get_logits_ith(self._context, end)
            drawn.append(int(_argmax(logits, self._vocabulary)))
        return drawn


def _start_llama_cpp(path: Path, threads: int) -> "Connection[Any, Any]":
    """Start its process, without what our workers' environment says to OpenMP; return what `_ask` asks."""
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    for name in BRIEFLY_SPINNING_THREADS:
        os.environ.pop(name)
    spawn.Process(target=_answer, args=(theirs, path, threads), daemon=True).start()
    os.environ.update(BRIEFLY_SPINNING_THREADS)
    return ours


def _answer(connection: "Connection[Any, Any]", path: Path, threads: int) -> None:
    step = LlamaCpp(load_library(), path, threads).step
    with suppress(EOFError):  # the benchmark has ended
        while True:
            connection.send(_run(step, connection.recv()))


def _ask(connection: "Connection[Any, Any]", plan: Plan) -> Measured:
    connection.send(plan)
    measured: Measured = connection.recv()
    return measured


def _argmax(logits: "ctypes._Pointer[ctypes.c_float]", count: int) -> int:
    import numpy as np

    return int(np.ctypeslib.as_array(logits, (count,)).argmax())


class _Ours:
    """The engine, called as a worker calls it."""

    def __init__(self, shard: LlamaShard, variant: Variant) -> None:
        shard.prepare(variant)
        self._shard = shard
        self._variant = variant
        self._pages = KvAllocator(shard.info)

    def step(self, texts: Sequence[Rows]) -> list[int]:
        """Take rows of several texts, and return the likeliest token after each."""
        options = SessionOptions(sampling=Sampling(max_tokens=1), variant=self._variant)
        for number, position, _ in texts:
            if position == 0:
                session = _session(number)
                self._pages.close(session, keep=False)
                self._shard.close(session)
                self._pages.open(session, 2 * CONTEXT if len(texts) > 1 else LONG + PREFILL, None)
                self._shard.begin(session, options, self._pages.begin(session, options))
        result = self._shard.step(_slices(texts))
        return [tokens_from_tensor(output.tensor)[0] for output in result.outputs]


async def _run_workers(workers: Sequence[Engine], plan: Plan) -> Measured:
    measured = {}
    for name in plan.workloads:
        (batch, length), count = WORKLOADS[name], plan.tokens
        for worker in workers:
            for number in range(batch):
                await worker.open(_session(number), length + count + 1)
                sampling = Sampling(max_tokens=1) if worker.info.is_last else None
                await worker.begin(_session(number), SessionOptions(sampling=sampling, variant=LLAMACPP))
        started_s = time.perf_counter()
        drawn = await _step_workers(workers, [(number, 0, _text(length, number)) for number in range(batch)])
        if name != "prefill":
            started_s = time.perf_counter()
            for position in range(length, length + count):
                drawn = await _step_workers(workers, [(number, position, [it]) for number, it in enumerate(drawn)])
        steps = 1 if name == "prefill" else count
        measured[name] = (time.perf_counter() - started_s) / steps * 1e3
        for worker in workers:
            for number in range(batch):
                await worker.close(_session(number))
    return measured


async def _step_workers(workers: Sequence[Engine], texts: Sequence[Rows]) -> list[int]:
    slices = _slices(texts)
    for worker in workers:
        result = await worker.step(slices)
        slices = [
            SliceInput(output.session, each.position, output.tensor, each.draws)
            for each, output in zip(slices, result.outputs, strict=True)
        ]
    return [tokens_from_tensor(each.tensor)[0] for each in slices]


def _slices(texts: Sequence[Rows]) -> list[SliceInput]:
    return [SliceInput(_session(number), position, tensor_from_tokens(given), 1) for number, position, given in texts]


def _session(number: int) -> SessionId:
    return SessionId(JobId(f"{number:032x}"), 0)


def _text(length: int, seed: int) -> list[int]:
    return [(seed * 7919 + position * 104729) % 31000 + 100 for position in range(length)]


if __name__ == "__main__":
    main()
