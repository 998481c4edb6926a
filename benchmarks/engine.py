"""Measures the engine alone, in one process: our variants beside transformers' generate, taken in turn.

    python -m benchmarks.engine [--json] [--rounds N] [--tokens N] [--variant ENGINE/ARITHMETIC]...

Prefill of 512 tokens, then decoding at batch 1 and 8. `bound`: how fast decoding at batch 1 could be if reading the
variant's weights, at the rate that this process reads memory, were all there is to it.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.common import demo_package
from node.engine.admission import KvPages
from node.engine.client import physical_cores, source_from_package
from node.engine.interface import EngineError, SessionOptions, SliceInput, Variant
from node.engine.shard import Shard
from node.engine.source import EngineOptions
from node.models.store import Package
from protocol.identity import BlockRange, JobId, SessionId
from protocol.messages import Sampling
from protocol.tensors import tensor_from_tokens, tokens_from_tensor

PREFILL = 512
CONTEXT = 64
BATCHES = (1, 8)
ELEMENT_BYTES = {"fp32": 4, "bf16": 2, "int8": 1, "w8a8": 1}
READ_BYTES = 256 << 20

Measured = dict[str, float]
"""Milliseconds of a prefill, and of a token at each batch."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.engine", description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=24, help="decoded in each round")
    parser.add_argument("--variant", action="append", help="one to measure; by default those that pay without AVX-512")
    options = parser.parse_args()
    torch.set_num_threads(physical_cores())
    package = demo_package()
    wanted = options.variant or ["eager/fp32", "fused/fp32", "fused/int8"]
    shard = _shard(package)
    runs: dict[str, Callable[[], Measured]] = {"transformers/fp32": _transformers(package, options.tokens)}
    for name in wanted:
        engine, _, arithmetic = name.partition("/")
        variant = Variant(engine, arithmetic)
        try:
            shard.prepare(variant)
        except EngineError as error:
            raise SystemExit(str(error)) from None
        runs[name] = _ours(shard, variant, options.tokens)
    rounds: dict[str, list[Measured]] = {name: [] for name in runs}
    for number in range(options.rounds + 1):
        for name, run in runs.items():
            measured = run()
            if number:  # the first warms up
                rounds[name].append(measured)
    read_bytes_per_s = _read_bytes_per_s()
    report = {
        name: {key: statistics.median(one[key] for one in measured) for key in measured[0]}
        | {"bound_ms": shard.info.weight_bytes / 4 * ELEMENT_BYTES[name.partition("/")[2]] / read_bytes_per_s * 1e3}
        for name, measured in rounds.items()
    }
    if options.json:
        print(json.dumps({"load": os.getloadavg()[0], "read_bytes_per_s": read_bytes_per_s, "milliseconds": report}))
        return
    print(f"load average {os.getloadavg()[0]:.1f}, memory read {read_bytes_per_s / 1e9:.1f} GB/s, medians in ms")
    columns = list(next(iter(report.values())))
    print(f"{'':20}" + "".join(f"{column:>16}" for column in columns))
    for name, row in report.items():
        print(f"{name:20}" + "".join(f"{row[column]:16.1f}" for column in columns))


def _shard(package: Package) -> Shard:
    blocks = BlockRange(0, package.manifest.block_count)
    return Shard(source_from_package(package, blocks), blocks, EngineOptions(kv_positions=8192))


def _ours(shard: Shard, variant: Variant, count: int) -> Callable[[], Measured]:
    pages = KvPages(shard.info)
    options = SessionOptions(sampling=Sampling(max_tokens=1), variant=variant)

    def take(parts: Sequence[tuple[SessionId, int, Sequence[int]]]) -> list[list[int]]:
        slices = [SliceInput(session=s, position=p, tensor=tensor_from_tokens(t), draws=1) for s, p, t in parts]
        return [tokens_from_tensor(output.tensor) for output in shard.step(slices).outputs]

    def run() -> Measured:
        measured = {}
        for name, batch, length, steps in (
            ("prefill", 1, PREFILL, 0),
            *((f"batch {b}", b, CONTEXT, count) for b in BATCHES),
        ):
            sessions = [SessionId(JobId(f"{number:032x}"), 0) for number in range(batch)]
            for session in sessions:
                pages.open(session, length + steps + 1, None)
                shard.begin(session, options, pages.begin(session, options))
            started_s = time.perf_counter()
            drawn = take([(session, 0, _text(length, number)) for number, session in enumerate(sessions)])
            if steps:
                started_s = time.perf_counter()
            for step in range(steps):
                drawn = take([(s, length + step, tokens) for s, tokens in zip(sessions, drawn, strict=True)])
            measured[f"{name}_ms"] = (time.perf_counter() - started_s) / max(1, steps) * 1e3
            for session in sessions:
                pages.close(session)
                shard.close(session)
        return measured

    return run


def _transformers(package: Package, count: int) -> Callable[[], Measured]:
    from safetensors.torch import load_file

    manifest = package.manifest
    config = {key: value for key, value in manifest.config.items() if key != "model_type"}
    model: Any = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(str(manifest.config["model_type"]), **config), dtype=torch.float32
    )
    weights: dict[str, torch.Tensor] = {}
    for entry in (manifest.embed, *manifest.blocks, manifest.head):
        weights |= load_file(package.path_of(entry))
    model.load_state_dict(weights, strict=False)
    model.tie_weights()
    model.eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0

    def generate(batch: int, length: int, tokens: int) -> float:
        rows = torch.tensor([_text(length, number) for number in range(batch)])
        started_s = time.perf_counter()
        model.generate(rows, attention_mask=torch.ones_like(rows), max_new_tokens=tokens, do_sample=False)
        return time.perf_counter() - started_s

    def run() -> Measured:
        measured = {"prefill_ms": generate(1, PREFILL, 1) * 1e3}
        for batch in BATCHES:
            first_s = generate(batch, CONTEXT, 1)
            measured[f"batch {batch}_ms"] = (generate(batch, CONTEXT, count + 1) - first_s) / count * 1e3
        return measured

    return run


def _text(length: int, seed: int) -> list[int]:
    return [(seed * 7919 + position * 104729) % 40000 + 100 for position in range(length)]


def _read_bytes_per_s() -> float:
    source = torch.ones(READ_BYTES // 4)
    times_s = []
    for _ in range(10):
        started_s = time.perf_counter()
        source.sum()
        times_s.append(time.perf_counter() - started_s)
    return READ_BYTES / min(times_s)


if __name__ == "__main__":
    main()
