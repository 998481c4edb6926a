"""Memory of a worker by variant, per parameter of a random Llama: what is held to serve, all told.

    python -m benchmarks.resident [--json] [--weights bf16|f32|q4_0|q8_0|q4_k_m] [--layers N] [--no-reference]
        [--variant ENGINE/ARITHMETIC]...

The shape is that of Llama 3.2 1B: 1.24 billion parameters, the embedding tied. Each variant gets a process of its own,
which imports what a worker imports and does as it does: it loads the span, builds the variant, answers a short job with
the reference (unless nobody wants it), gives that back, and answers a short job with the variant. Graphs are in the
disk cache, as for every worker but the first. MiB: the proportional set size after that, pages of mapped files,
libraries and the interpreter included. `bytes a parameter`: all of that, and without what a process takes for a model
of next to no weights.
"""

import json
import multiprocessing
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
import numpy as np

from node.engine.interface import EngineOptions, SessionOptions, ShardSource, SliceInput, Variant, reference_variant
from node.engine.kv_allocator import KvAllocator
from node.engine.open_shard import open_shard
from node.engine.shard import Shard
from node.models.layout import GGUF
from protocol.identity import BlockRange, JobId, ModelId, SessionId
from protocol.messages import Sampling
from protocol.tensors import tensor_from_tokens, tokens_from_tensor

VARIANTS = ("eager/fp32", "fused/fp32", "fused/bf16", "fused/int8", "onnxruntime/fp32", "onnxruntime/int8",
            "onnxruntime/int4")  # fmt: skip
GGUF_VARIANTS = ("llamacpp/native", "onnxruntime/native")
DTYPES = {"bf16": "bfloat16", "f32": "float32"}
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
TINY = {"vocab_size": 256, "hidden_size": 256, "intermediate_size": 256, "head_dim": 8}


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@click.option("--weights", type=click.Choice([*DTYPES, "q4_0", "q8_0", "q4_k_m"]), default="bf16", help="As published.")
@click.option("--layers", type=int, default=16)
@click.option("--reference/--no-reference", default=True, help="Whether a job asks for the reference first.")
@click.option("--variant", "variants", multiple=True, help="As engine/arithmetic; all that the weights allow.")
def main(as_json: bool, weights: str, layers: int, reference: bool, variants: Sequence[str]) -> None:
    """Measure the memory of a worker by variant."""
    variants = variants or (VARIANTS if weights in DTYPES else GGUF_VARIANTS)
    result = measure(weights, layers, variants, is_reference_wanted=reference)
    click.echo(json.dumps(result) if as_json else report(result))


@dataclass(frozen=True)
class Weighing:
    """What a process weighs: a variant of a model with so many layers."""

    source: ShardSource
    layers: int
    variant: str
    graphs: Path
    is_reference_wanted: bool


def measure(weights: str, layers: int, variants: Sequence[str], *, is_reference_wanted: bool) -> dict[str, Any]:
    """Return all figures."""
    from benchmarks.common import describe_machine  # imports more than a worker does

    rows = {}
    processes = multiprocessing.get_context("spawn")
    with TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "tiny").mkdir()
        tiny, _ = make_model(folder / "tiny", weights, {**SHAPE, **TINY}, 1)
        source, parameters = make_model(folder, weights, SHAPE, layers)

        def weighed(source: ShardSource, layers: int, variant: str) -> dict[str, float]:
            wanted = Weighing(source, layers, variant, folder / "graphs", is_reference_wanted)
            with processes.Pool(1, maxtasksperchild=1) as pool:
                if variant.startswith("onnxruntime"):
                    pool.apply(weigh, (wanted,))  # whose graphs are in the disk cache then
                return pool.apply(weigh, (wanted,))

        for variant in variants:
            fixed_mib = weighed(tiny, 1, variant)["resident_mib"]
            row = weighed(source, layers, variant)
            row["fixed_mib"] = fixed_mib
            row["bytes_a_parameter"] = row["resident_mib"] * MIB / parameters
            row["weight_bytes_a_parameter"] = (row["resident_mib"] - fixed_mib) * MIB / parameters
            rows[variant] = row
    return {**describe_machine(), "weights": weights, "parameters": parameters, "variants": rows}


def weigh(wanted: Weighing) -> dict[str, float]:
    """Return the memory of this process with a variant, and how long it took to load and to build."""
    variant, reference = Variant(*wanted.variant.split("/")), reference_variant(wanted.source.format)
    started_s = time.perf_counter()
    options = EngineOptions(kv_positions=1024, cache_dir=wanted.graphs)
    shard = open_shard(wanted.source, BlockRange(0, wanted.layers), options)
    loaded_s = time.perf_counter()
    shard.prepare(variant)
    built_s = time.perf_counter()
    if variant != reference and wanted.is_reference_wanted:
        run_job(shard, reference)
        shard.unload_reference()
    first_s, token_s = run_job(shard, variant)
    return {
        "resident_mib": resident_bytes(os.getpid()) / MIB,
        "load_s": loaded_s - started_s,
        "build_s": built_s - loaded_s,
        "first_token_s": first_s,
        "token_ms": token_s * 1e3,
    }


def run_job(shard: Shard[Any], variant: Variant) -> tuple[float, float]:
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


def make_model(folder: Path, weights: str, shape: dict[str, Any], layers: int) -> tuple[ShardSource, int]:
    """Write the files of a model with random weights; return where they lie, and the number of its parameters."""
    if weights not in DTYPES:
        return make_gguf_model(folder, weights, shape, layers)
    import torch
    from safetensors.torch import save_file

    files = {}
    counts = []
    for part in ("embed", *range(layers), "head"):
        tensors = {
            name: torch.randn(sizes).mul_(0.02).to(getattr(torch, DTYPES[weights]))
            for name, sizes in _tensors(part, shape)
        }
        files[part] = folder / f"{part}.safetensors"
        save_file(tensors, files[part])
        counts += [tensor.numel() for tensor in tensors.values()]
    source = ShardSource(
        model=ModelId("0" * 64),
        config={**shape, "num_hidden_layers": layers, "dtype": DTYPES[weights]},
        block_files={number: files[number] for number in range(layers)},
        embed_file=files["embed"],
        head_file=files["head"],
    )
    return source, sum(counts)


def make_gguf_model(folder: Path, weights: str, shape: dict[str, Any], layers: int) -> tuple[ShardSource, int]:
    """Write the files of a GGUF package with random numbers in the quantisation.

    Of Q4_K_M, llama.cpp's mixture: half of the blocks have `attn_v` and `ffn_down` in Q6_K, as the embedding is.
    """
    from gguf.constants import GGUFValueType

    from node.models.gguf_writer import STRING, U32, GgufData, GgufValue, write_gguf

    float_type = (GGUFValueType.FLOAT32,)
    numbers = {
        "block_count": layers,
        "context_length": shape["max_position_embeddings"],
        "embedding_length": shape["hidden_size"],
        "feed_forward_length": shape["intermediate_size"],
        "attention.head_count": shape["num_attention_heads"],
        "attention.head_count_kv": shape["num_key_value_heads"],
        "rope.dimension_count": shape["head_dim"],
        "vocab_size": shape["vocab_size"],
    }
    metadata = {f"llama.{key}": GgufValue(value, U32) for key, value in numbers.items()}
    metadata |= {
        "general.architecture": GgufValue("llama", STRING),
        "llama.attention.layer_norm_rms_epsilon": GgufValue(shape["rms_norm_eps"], float_type),
        "llama.rope.freq_base": GgufValue(shape["rope_theta"], float_type),
    }
    write_gguf(folder / "common.gguf", metadata, [])
    random, count = np.random.default_rng(0), 0
    for part in ("embed", *range(layers), "head"):
        tensors = []
        for name, sizes in _tensors(part, shape):
            kind = _gguf_type(name, part, weights, len(sizes))
            known = _GGUF_NAMES[name.removeprefix(f"model.layers.{part}.")]
            tensors.append(GgufData(known.format(part), sizes, kind, _random_data(random, sizes, kind)))
            count += int(np.prod(sizes))
        write_gguf(folder / f"{part}.gguf", metadata if part == "embed" else _architecture(metadata), tensors)
    source = ShardSource(
        model=ModelId("0" * 64),
        config={**shape, "num_hidden_layers": layers},
        block_files={number: folder / f"{number}.gguf" for number in range(layers)},
        embed_file=folder / "embed.gguf",
        head_file=folder / "head.gguf",
        format=GGUF,
        common_file=folder / "common.gguf",
    )
    return source, count


_GGUF_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "self_attn.q_proj.weight": "blk.{}.attn_q.weight",
    "self_attn.k_proj.weight": "blk.{}.attn_k.weight",
    "self_attn.v_proj.weight": "blk.{}.attn_v.weight",
    "self_attn.o_proj.weight": "blk.{}.attn_output.weight",
    "mlp.gate_proj.weight": "blk.{}.ffn_gate.weight",
    "mlp.up_proj.weight": "blk.{}.ffn_up.weight",
    "mlp.down_proj.weight": "blk.{}.ffn_down.weight",
    "input_layernorm.weight": "blk.{}.attn_norm.weight",
    "post_attention_layernorm.weight": "blk.{}.ffn_norm.weight",
}


def _architecture(metadata: dict[str, Any]) -> dict[str, Any]:
    return {"general.architecture": metadata["general.architecture"]}


def _gguf_type(name: str, part: str | int, weights: str, dimensions: int) -> Any:
    from gguf.constants import GGMLQuantizationType

    if dimensions == 1:
        return GGMLQuantizationType.F32
    if weights != "q4_k_m":
        return GGMLQuantizationType[weights.upper()]
    is_precise = isinstance(part, str) or (part % 2 and ("v_proj" in name or "down_proj" in name))
    return GGMLQuantizationType.Q6_K if is_precise else GGMLQuantizationType.Q4_K


def _random_data(random: np.random.Generator, sizes: tuple[int, ...], kind: Any) -> bytes:
    """Return random blocks of a type, with small scales where these are."""
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    if kind is GGMLQuantizationType.F32:
        return np.ones(sizes, np.float32).tobytes()
    elements, size_bytes = GGML_QUANT_SIZES[kind]
    data = random.integers(0, 256, (int(np.prod(sizes)) // elements, size_bytes), np.uint8)
    scale = np.array([0.002 if elements == 32 else 0.0001], np.float16).view(np.uint8)
    at_end = kind is GGMLQuantizationType.Q6_K
    data[:, slice(208, 210) if at_end else slice(0, 2)] = scale
    if kind is GGMLQuantizationType.Q4_K:
        data[:, 2:4] = scale
    return data.tobytes()


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
    lines = [f"{result['parameters'] / 1e9:.2f} billion parameters, {result['weights']}"]
    lines.append(
        f"{'variant':18} {'MiB':>6} {'bytes a parameter':>18} {'without the fixed part':>23} {'fixed MiB':>10} "
        f"{'load s':>8} {'build s':>8} {'first token s':>14} {'token ms':>9}"
    )
    lines += [
        f"{name:18} {row['resident_mib']:6.0f} {row['bytes_a_parameter']:18.2f} {row['weight_bytes_a_parameter']:23.2f}"
        f" {row['fixed_mib']:10.0f} {row['load_s']:8.1f} {row['build_s']:8.1f} {row['first_token_s']:14.1f}"
        f" {row['token_ms']:9.0f}"
        for name, row in result["variants"].items()
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
