"""Memory of a worker by variant, per parameter of a random Llama: what is held to serve, all told.

    python -m benchmarks.resident [--json] [--dtype bfloat16|float32] [--layers N] [--variant ENGINE/ARITHMETIC]...

The shape is that of Llama 3.2 1B: 1.24 billion parameters, the embedding tied. Each variant gets a process of its own,
which does as a worker does: it loads the span, builds the variant, answers a short job with the reference, gives that
back, and answers a short job with the variant. MiB: the proportional set size after that, pages of mapped files, torch
and the interpreter included. `bytes a parameter`: all of that, and without what a process takes for a model of next to
no weights.
"""

import json
import multiprocessing
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
import torch
from safetensors.torch import save_file

from benchmarks.common import describe_machine
from node.engine.interface import REFERENCE, EngineOptions, SessionOptions, ShardSource, SliceInput, Variant
from node.engine.kv_allocator import KvAllocator
from node.engine.torch_shard import TorchShard
from protocol.identity import BlockRange, JobId, ModelId, SessionId
from protocol.messages import Sampling
from protocol.tensors import tensor_from_tokens, tokens_from_tensor

VARIANTS = ("eager/fp32", "fused/fp32", "fused/bf16", "fused/int8", "onnxruntime/fp32", "onnxruntime/int8",
            "onnxruntime/int4")  # fmt: skip
PROMPT_TOKENS = 32
DECODED_TOKENS = 8
MIB = 2**20

SHAPE: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 8192,
    "rope_theta": 500000.0,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}
TINY = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 64, "head_dim": 4}


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@click.option("--dtype", type=click.Choice(["bfloat16", "float32"]), default="bfloat16", help="Of the files.")
@click.option("--layers", type=int, default=16)
@click.option("--variant", "variants", multiple=True, default=VARIANTS)
def main(as_json: bool, dtype: str, layers: int, variants: Sequence[str]) -> None:
    """Measure the memory of a worker by variant."""
    result = measure(dtype, layers, variants)
    click.echo(json.dumps(result) if as_json else report(result))


def measure(dtype: str, layers: int, variants: Sequence[str]) -> dict[str, Any]:
    """Return all figures."""
    rows = {}
    processes = multiprocessing.get_context("spawn")
    with TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "tiny").mkdir()
        tiny, _ = make_model(folder / "tiny", getattr(torch, dtype), {**SHAPE, **TINY}, 1)
        source, parameters = make_model(folder, getattr(torch, dtype), SHAPE, layers)
        with processes.Pool(1, maxtasksperchild=1) as pool:
            fixed_mib = pool.apply(weigh, (tiny, 1, "fused/int8", folder / "graphs"))["resident_mib"]
            for variant in variants:
                rows[variant] = pool.apply(weigh, (source, layers, variant, folder / "graphs"))
    for row in rows.values():
        row["bytes_a_parameter"] = row["resident_mib"] * MIB / parameters
        row["weight_bytes_a_parameter"] = (row["resident_mib"] - fixed_mib) * MIB / parameters
    figures = {"dtype": dtype, "parameters": parameters, "fixed_mib": fixed_mib, "variants": rows}
    return {**describe_machine(), **figures}


def weigh(source: ShardSource, layers: int, name: str, graphs: Path) -> dict[str, float]:
    """Return the memory of this process with a variant, and how long it took to load and to build."""
    variant = Variant(*name.split("/"))
    started_s = time.perf_counter()
    shard = TorchShard(source, BlockRange(0, layers), EngineOptions(kv_positions=1024, cache_dir=graphs))
    loaded_s = time.perf_counter()
    shard.prepare(variant)
    built_s = time.perf_counter()
    if variant != REFERENCE:
        run_job(shard, REFERENCE)
        if hasattr(shard, "unload_reference"):  # which an earlier version kept
            shard.unload_reference()
    first_s, token_s = run_job(shard, variant)
    return {
        "resident_mib": resident_bytes(os.getpid()) / MIB,
        "load_s": loaded_s - started_s,
        "build_s": built_s - loaded_s,
        "first_token_s": first_s,
        "token_ms": token_s * 1e3,
    }


def run_job(shard: TorchShard, variant: Variant) -> tuple[float, float]:
    """Run a short job; return seconds until its first token, and the median of the others."""
    pages = KvAllocator(shard.info)
    session = SessionId(JobId("0" * 32), 0)
    options = SessionOptions(sampling=Sampling(max_tokens=1), variant=variant)
    tokens, position, times_s = list(range(1, PROMPT_TOKENS + 1)), 0, list[float]()
    pages.open(session, PROMPT_TOKENS + DECODED_TOKENS, None)
    shard.begin(session, options, pages.begin(session, options))
    for _ in range(DECODED_TOKENS):
        started_s = time.perf_counter()
        rows = SliceInput(session=session, position=position, tensor=tensor_from_tokens(tokens), draws=1)
        position += len(tokens)
        tokens = tokens_from_tensor(shard.step([rows]).outputs[0].tensor)
        times_s.append(time.perf_counter() - started_s)
    shard.close(session)
    return times_s[0], sorted(times_s[1:])[len(times_s) // 2]


def make_model(folder: Path, dtype: torch.dtype, shape: dict[str, Any], layers: int) -> tuple[ShardSource, int]:
    """Write the files of a model with random weights; return where they lie, and the number of its parameters."""
    files = {}
    counts = []
    for part in ("embed", *range(layers), "head"):
        tensors = {name: torch.randn(sizes).mul_(0.02).to(dtype) for name, sizes in _tensors(part, shape)}
        files[part] = folder / f"{part}.safetensors"
        save_file(tensors, files[part])
        counts += [tensor.numel() for tensor in tensors.values()]
    source = ShardSource(
        model=ModelId("0" * 64),
        config={**shape, "num_hidden_layers": layers, "dtype": str(dtype).removeprefix("torch.")},
        block_files={number: files[number] for number in range(layers)},
        embed_file=files["embed"],
        head_file=files["head"],
    )
    return source, sum(counts)


def _tensors(part: str | int, shape: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    width, inner = shape["hidden_size"], shape["intermediate_size"]
    queries, keys = (shape[key] * shape["head_dim"] for key in ("num_attention_heads", "num_key_value_heads"))
    if part == "embed":
        yield "model.embed_tokens.weight", (shape["vocab_size"], width)
    elif part == "head":
        yield "model.norm.weight", (width,)
    else:
        for name, sizes in {
            "self_attn.q_proj": (queries, width),
            "self_attn.k_proj": (keys, width),
            "self_attn.v_proj": (keys, width),
            "self_attn.o_proj": (width, queries),
            "mlp.gate_proj": (inner, width),
            "mlp.up_proj": (inner, width),
            "mlp.down_proj": (width, inner),
            "input_layernorm": (width,),
            "post_attention_layernorm": (width,),
        }.items():
            yield f"model.layers.{part}.{name}.weight", sizes


def resident_bytes(pid: int) -> int:
    """Return a process's proportional set size."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("the kernel does not say how much memory a process takes")


def report(result: dict[str, Any]) -> str:
    """Return the figures as a table."""
    lines = [
        (
            f"{result['parameters'] / 1e9:.2f} billion parameters, {result['dtype']}; without weights a worker takes "
            f"{result['fixed_mib']:.0f} MiB"
        ),
        "variant             MiB  bytes a parameter  without the fixed part   load s  build s  first token s  token ms",
    ]
    lines += [
        f"{name:16} {row['resident_mib']:6.0f} {row['bytes_a_parameter']:18.2f} {row['weight_bytes_a_parameter']:23.2f}"
        f" {row['load_s']:8.1f} {row['build_s']:8.1f} {row['first_token_s']:14.1f} {row['token_ms']:9.0f}"
        for name, row in result["variants"].items()
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
