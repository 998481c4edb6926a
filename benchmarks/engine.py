"""Prefill and decode speed of the engine alone, beside other engines with the same model.

    python -m benchmarks.engine [--json] [--rounds N] [--tokens N] [--variant ENGINE/ARITHMETIC]... [--no-rivals]
                                [--model MODEL_OR_DIR] [--device cpu|cuda]

Prefill of 512 tokens, then decoding at batch 1 and 8; the engines run in turn. `bound`: the decode rate at batch 1 if
reading the weights at this process's memory bandwidth were the only cost. `beside`: our best variant over the best of
the others at equal precision (fp32 or int8, with activations quantised or not). `benchmarks/rivals.py` lists the other
engines and how to install them.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from benchmarks.rivals import Generate, NotInstalledError, rivals
from node.engine.interface import EngineError, EngineOptions, SessionOptions, SliceInput, Variant, source_from_package
from node.engine.kv_allocator import KvAllocator
from node.engine.torch_shard import TorchShard
from node.models.importer import import_model
from node.models.store import ModelStore, Package
from node.util.priority import BRIEFLY_SPINNING_THREADS
from node.util.processor import physical_cores
from protocol.identity import BlockRange, JobId, SessionId
from protocol.messages import Sampling
from protocol.tensors import tensor_from_tokens, tokens_from_tensor
from tests.support.demo_model import DEQUANTISED, dequantised_demo_model

PREFILL = 512
CONTEXT = 64
BATCHES = (1, 8)
PRECISIONS = {"fp32": "fp32", "bf16": "bf16", "int8": "int8", "w8a8": "int8", "int4": "int4"}
"""Of each arithmetic: others call it int8, too, when activations are rounded."""

ELEMENT_BYTES = {"fp32": 4.0, "bf16": 2.0, "int8": 1.0, "w8a8": 1.0, "int4": 0.5}
PUBLISHED_BYTES = {"bfloat16": 2, "float16": 2}
READ_BYTES = {"cpu": 256 << 20, "cuda": 4 << 30}
"""What is read to see how fast a device reads: on a GPU so much that launching the operation does not count."""

VARIANTS = ("eager/fp32", "fused/fp32", "onnxruntime/fp32", "fused/int8", "onnxruntime/int8", "onnxruntime/int4")
AVX512_VARIANTS = ("fused/bf16", "fused/w8a8")
GPU_VARIANTS = ("eager/fp32", "fused/fp32", "fused/bf16", "fused/int8")
Measured = dict[str, float]
"""Milliseconds of a prefill, and of a token at each batch."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.engine", description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=24, help="decoded in each round")
    parser.add_argument(
        "--variant", action="append", help="a variant to measure; by default those suited to the device"
    )
    parser.add_argument("--model", default=DEQUANTISED, help="a model id, or a folder to import")
    parser.add_argument("--device", default="cpu", help="torch device")
    parser.add_argument("--no-rivals", action="store_true", help="measure ours alone")
    options = parser.parse_args()
    if not BRIEFLY_SPINNING_THREADS.items() <= os.environ.items():  # OpenMP reads them when it is loaded
        command = [sys.executable, "-m", "benchmarks.engine", *sys.argv[1:]]
        os.execve(sys.executable, command, os.environ | BRIEFLY_SPINNING_THREADS)  # as our workers have them
    torch.set_num_threads(physical_cores())
    device = torch.device(options.device)
    is_demo = options.model == DEQUANTISED
    package = dequantised_demo_model() if is_demo else import_model(options.model, ModelStore())
    shard = _shard(package, options.device)
    variants = options.variant or _usual_variants(device)
    ours = _ours_all(shard, variants, options.tokens)
    others: dict[str, Callable[[], Measured]] = {}
    missing: dict[str, str] = {}
    for name, rival in () if options.no_rivals else rivals(package, physical_cores(), device):
        if isinstance(rival, NotInstalledError):
            missing[name] = str(rival)
        else:
            others[name] = _rival(rival, options.tokens)
    milliseconds = _medians(ours | others, options.rounds)
    read_bytes_per_s = _read_bytes_per_s(device)
    elements = shard.info.weight_bytes / PUBLISHED_BYTES.get(str(package.manifest.config.get("dtype")), 4)
    for name, row in milliseconds.items():
        row["bound_ms"] = elements * ELEMENT_BYTES[name.partition("/")[2]] / read_bytes_per_s * 1e3
    report = {
        "load": os.getloadavg()[0],
        "read_bytes_per_s": read_bytes_per_s,
        "milliseconds": milliseconds,
        "beside": _beside(milliseconds, ours, others),
        "not_installed": missing,
    }
    if options.json:
        print(json.dumps(report))
    else:
        _show(report)


def _usual_variants(device: torch.device) -> Sequence[str]:
    """Return the variants that suit a device."""
    if device.type != "cpu":
        return GPU_VARIANTS
    return (*VARIANTS, *(AVX512_VARIANTS if torch.backends.cpu.get_cpu_capability().startswith("AVX512") else ()))


def _medians(runs: dict[str, Callable[[], Measured]], rounds: int) -> dict[str, Measured]:
    """Return medians, measured in alternation so that other load on the machine affects all alike."""
    measured: dict[str, list[Measured]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name, run in runs.items():
            one = run()
            if number:  # the first warms up
                measured[name].append(one)
    return {
        name: {key: statistics.median(one[key] for one in all_) for key in all_[0]} for name, all_ in measured.items()
    }


def _beside(
    milliseconds: dict[str, Measured], ours: Iterable[str], others: Iterable[str]
) -> dict[str, dict[str, float]]:
    """Return for each precision that both sides have, and each figure, our best over theirs."""
    best: list[dict[str, Measured]] = []
    for side in (ours, others):
        fastest: dict[str, Measured] = {}
        for name in side:
            known = fastest.setdefault(PRECISIONS[name.partition("/")[2]], dict(milliseconds[name]))
            known |= {key: min(value, known[key]) for key, value in milliseconds[name].items()}
        best.append(fastest)
    return {
        precision: {
            key: best[0][precision][key] / best[1][precision][key] for key in best[0][precision] if key != "bound_ms"
        }
        for precision in sorted(best[0].keys() & best[1].keys())
    }


def _show(report: dict[str, Any]) -> None:
    """Print the report as a table."""
    milliseconds = report["milliseconds"]
    print(f"load average {report['load']:.1f}, memory read {report['read_bytes_per_s'] / 1e9:.1f} GB/s, medians in ms")
    columns = list(next(iter(milliseconds.values())))
    print(f"{'':24}" + "".join(f"{column:>16}" for column in columns))
    for name, row in milliseconds.items():
        print(f"{name:24}" + "".join(f"{row[column]:16.1f}" for column in columns))
    for precision, ratios in report["beside"].items():
        print(
            f"{f'best of ours / others, {precision}':24} "
            + ", ".join(f"{key} {value:.2f}" for key, value in ratios.items())
        )
    for name, why in report["not_installed"].items():
        print(f"{name}: not measured: {why}")


def _shard(package: Package, device: str) -> TorchShard:
    blocks = BlockRange(0, package.manifest.block_count)
    return TorchShard(
        source_from_package(package, blocks),
        blocks,
        EngineOptions(kv_positions=8192, device=device, narrow_kv=device != "cpu"),
    )


def _ours_all(shard: TorchShard, names: Iterable[str], count: int) -> dict[str, Callable[[], Measured]]:
    runs = {}
    for name in names:
        engine, _, arithmetic = name.partition("/")
        variant = Variant(engine, arithmetic)
        try:
            shard.prepare(variant)
        except EngineError as error:
            raise SystemExit(str(error)) from None
        runs[name] = _ours(shard, variant, count)
    return runs


def _ours(shard: TorchShard, variant: Variant, count: int) -> Callable[[], Measured]:
    pages = KvAllocator(shard.info)
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


def _rival(generate: Generate, count: int) -> Callable[[], Measured]:
    def run() -> Measured:
        measured = {"prefill_ms": generate([_text(PREFILL, 0)], 1) * 1e3}
        for batch in BATCHES:
            prompts = [_text(CONTEXT, number) for number in range(batch)]
            first_s = generate(prompts, 1)
            measured[f"batch {batch}_ms"] = (generate(prompts, count + 1) - first_s) / count * 1e3
        return measured

    return run


def _text(length: int, seed: int) -> list[int]:
    """Return token ids that every model of today's has: the smallest vocabularies are of 32,000."""
    return [(seed * 7919 + position * 104729) % 31000 + 100 for position in range(length)]


def _read_bytes_per_s(device: torch.device) -> float:
    size = READ_BYTES.get(device.type, READ_BYTES["cpu"])
    source = torch.ones(size // 4, device=device)
    times_s = []
    for _ in range(10):
        started_s = time.perf_counter()
        source.sum().item()
        times_s.append(time.perf_counter() - started_s)
    return size / min(times_s)


if __name__ == "__main__":
    main()
