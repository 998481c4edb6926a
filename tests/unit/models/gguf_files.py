"""Tiny random GGUF files of several architectures."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np

VOCABULARY = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *(chr(code) for code in range(ord("!"), ord("~"))), "ab"]
HIDDEN, HEADS, GROUPS, BLOCKS, INNER = 32, 4, 2, 2, 64
HEAD_SIZE = HIDDEN // HEADS

Tensors = dict[str, np.ndarray]

_RMS = {"attention.layer_norm_rms_epsilon": 1e-5}
_LAYER_NORM = {"attention.layer_norm_epsilon": 1e-5}
_SHAPE: dict[str, Any] = {
    "context_length": 64,
    "embedding_length": HIDDEN,
    "block_count": BLOCKS,
    "feed_forward_length": INNER,
    "attention.head_count": HEADS,
    "attention.head_count_kv": GROUPS,
}
_TOKENIZER: dict[str, Any] = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "default",
    "tokenizer.ggml.tokens": VOCABULARY,
    "tokenizer.ggml.token_type": [3, 3, 3] + [1] * (len(VOCABULARY) - 3),
    "tokenizer.ggml.merges": ["a b"],
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
}
_DENSE = {"ffn_gate": (INNER, HIDDEN), "ffn_up": (INNER, HIDDEN), "ffn_down": (HIDDEN, INNER)}
_EXPERTS = {
    "ffn_gate_inp": (4, HIDDEN),
    "ffn_gate_exps": (4, 24, HIDDEN),
    "ffn_up_exps": (4, 24, HIDDEN),
    "ffn_down_exps": (4, HIDDEN, 24),
}


def metadata(architecture: str = "llama", *, tokenizer: bool = True, **own: Any) -> dict[str, Any]:
    """Return a tiny model's metadata; `own` are keys of its architecture, with `__` for the point."""
    keys = {**_SHAPE, **(_LAYER_NORM if architecture in {"starcoder2", "gpt2", "falcon"} else _RMS)}
    if architecture == "llama":
        keys |= {"rope.freq_base": 10000.0, "rope.dimension_count": HEAD_SIZE}
    if architecture == "qwen3moe":
        keys |= {"expert_count": 4, "expert_used_count": 2, "expert_feed_forward_length": 24}
        keys |= {"attention.key_length": HEAD_SIZE, "attention.value_length": HEAD_SIZE}
    if architecture == "falcon":
        keys |= {"attention.head_count_kv": 1, "feed_forward_length": 4 * HIDDEN}
    keys |= {key.replace("__", "."): value for key, value in own.items()}
    stated = {f"{architecture}.{key}": value for key, value in keys.items() if value is not None}
    return {"general.architecture": architecture, **stated, **(_TOKENIZER if tokenizer else {})}


def tensors(architecture: str = "llama", *, output: bool = True, seed: int = 0) -> Tensors:
    """Return a tiny model's tensors."""
    random = np.random.default_rng(seed)
    rows = {"attn_q": HIDDEN, "attn_k": GROUPS * HEAD_SIZE, "attn_v": GROUPS * HEAD_SIZE, "attn_output": HIDDEN}
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (len(VOCABULARY), HIDDEN),
        "output_norm.weight": (HIDDEN,),
    }
    if output:
        shapes["output.weight"] = (len(VOCABULARY), HIDDEN)
    for block in range(BLOCKS):
        inner = dict(_EXPERTS if architecture == "qwen3moe" else _DENSE)
        of_block: dict[str, tuple[int, ...]] = {
            "attn_norm.weight": (HIDDEN,),
            "ffn_norm.weight": (HIDDEN,),
            **{f"{name}.weight": (count, HIDDEN) for name, count in rows.items()},
        }
        if architecture == "qwen3moe":
            of_block |= {"attn_q_norm.weight": (HEAD_SIZE,), "attn_k_norm.weight": (HEAD_SIZE,)}
        if architecture == "qwen2":
            of_block |= {f"{name}.bias": (rows[name],) for name in ("attn_q", "attn_k", "attn_v")}
        if architecture == "gemma3":
            of_block |= {"attn_q_norm.weight": (HEAD_SIZE,), "attn_k_norm.weight": (HEAD_SIZE,)}
            of_block |= {"post_attention_norm.weight": (HIDDEN,), "post_ffw_norm.weight": (HIDDEN,)}
        if architecture == "phi3":
            of_block = {name: shape for name, shape in of_block.items() if "norm" in name or "output" in name}
            of_block["attn_qkv.weight"] = (HIDDEN + 2 * GROUPS * HEAD_SIZE, HIDDEN)
            inner = {"ffn_up": (2 * INNER, HIDDEN), "ffn_down": (HIDDEN, INNER)}
        if architecture == "starcoder2":
            del inner["ffn_gate"]
            biased = {**rows, "attn_norm": HIDDEN, "ffn_norm": HIDDEN, "ffn_up": INNER, "ffn_down": HIDDEN}
            of_block |= {f"{name}.bias": (count,) for name, count in biased.items()}
            shapes["output_norm.bias"] = (HIDDEN,)
        if architecture == "falcon":
            qkv = (HEADS + 2) * HEAD_SIZE
            of_block = {"attn_qkv.weight": (qkv, HIDDEN), "attn_output.weight": (HIDDEN, HIDDEN)}
            of_block |= {"attn_norm.weight": (HIDDEN,), "attn_norm.bias": (HIDDEN,)}
            inner = {"ffn_up": (4 * HIDDEN, HIDDEN), "ffn_down": (HIDDEN, 4 * HIDDEN)}
            shapes["output_norm.bias"] = (HIDDEN,)
        of_block |= {f"{name}.weight": shape for name, shape in inner.items()}
        shapes |= {f"blk.{block}.{name}": shape for name, shape in of_block.items()}
    return {name: random.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}


def write_gguf(
    path: Path, keys: Mapping[str, Any] | None = None, weights: Tensors | None = None, *, quantised: str = " "
) -> Path:
    """Write one file, with matrices whose names contain `quantised` in 8 bits."""
    keys = dict(metadata() if keys is None else keys)
    writer = gguf.GGUFWriter(path, keys.pop("general.architecture"))
    for key, value in keys.items():
        _add(writer, key, value)
    for name, tensor in (tensors() if weights is None else weights).items():
        if quantised in name and tensor.ndim == 2:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quants.quantize(tensor, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_split(
    folder: Path, keys: Mapping[str, Any] | None = None, weights: Tensors | None = None, *, count: int = 2
) -> list[Path]:
    """Write a model in several parts; the first has the metadata, the tensors are dealt out in turn."""
    folder.mkdir(exist_ok=True)
    keys, weights = metadata() if keys is None else keys, tensors() if weights is None else weights
    paths = []
    for number in range(count):
        own = keys if number == 0 else {"general.architecture": keys["general.architecture"]}
        split = {"split.no": number, "split.count": count, "split.tensors.count": len(weights)}
        names = list(weights)[number::count]
        path = folder / f"tiny-{number + 1:05d}-of-{count:05d}.gguf"
        paths.append(write_gguf(path, {**own, **split}, {name: weights[name] for name in names}))
    return paths


def without(weights: Tensors, names: Iterable[str]) -> Tensors:
    """Return tensors without those whose names begin like this."""
    return {name: tensor for name, tensor in weights.items() if not name.startswith(tuple(names))}


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    match value:
        case bool():
            writer.add_bool(key, value)
        case int():
            (writer.add_uint16 if key in {"split.no", "split.count"} else writer.add_uint32)(key, value)
        case float():
            writer.add_float32(key, value)
        case str():
            writer.add_string(key, value)
        case _:
            writer.add_array(key, value)


def write_large(path: Path, size_bytes: int) -> Path:
    """Write a Llama of about this size in Q8_0, of random bytes, without holding it in memory."""
    width = 2048
    shapes = {
        "attn_q": (width, width),
        "attn_output": (width, width),
        "attn_k": (width, width),
        "attn_v": (width, width),
    }
    shapes |= {"ffn_gate": (3 * width, width), "ffn_up": (3 * width, width), "ffn_down": (width, 3 * width)}
    block_bytes = sum(rows * columns for rows, columns in shapes.values()) // 32 * 34
    blocks = max(1, size_bytes // block_bytes)
    writer = gguf.GGUFWriter(path, "llama")
    keys = {"embedding_length": width, "block_count": blocks, "feed_forward_length": 3 * width}
    for key, value in metadata(
        attention__head_count=16, attention__head_count_kv=16, rope__dimension_count=128
    ).items():
        if key != "general.architecture":
            _add(writer, key, keys.get(key.removeprefix("llama."), value))
    named = {"token_embd": (len(VOCABULARY), width)}
    named |= {f"blk.{block}.{name}": shape for block in range(blocks) for name, shape in shapes.items()}
    norms = ["output_norm", *(f"blk.{block}.{kind}_norm" for block in range(blocks) for kind in ("attn", "ffn"))]
    kind = gguf.GGMLQuantizationType.Q8_0
    for name in norms:
        writer.add_tensor_info(f"{name}.weight", [width], np.dtype(np.float32), 4 * width)
    for name, (rows, columns) in named.items():
        row_bytes = columns // 32 * 34
        info = ([rows, row_bytes], np.dtype(np.uint8), rows * row_bytes)
        writer.add_tensor_info(f"{name}.weight", *info, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    noise = np.random.default_rng(0).bytes(1 << 20)
    with path.open("r+b") as file:
        file.seek(0, 2)
        file.write(bytes(-file.tell() % 32))
        left = sum(4 * width for _ in norms) + sum(rows * columns // 32 * 34 for rows, columns in named.values())
        while left:
            left -= file.write(noise[: min(left, len(noise))])
    return path
