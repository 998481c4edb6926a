"""Tiny checkpoints made of plain bytes, as transformers would have saved them."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

Tensors = dict[str, np.ndarray]

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 8,
    "num_hidden_layers": 3,
    "vocab_size": 300,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-05,
    "eos_token_id": 2,
    "bos_token_id": 1,
    "torch_dtype": "float32",
    "transformers_version": "4.1.0",
    "_name_or_path": "/home/somebody/model",
}


def llama_tensors(*, blocks: int = 3, output: bool = True, seed: int = 0) -> Tensors:
    rng = np.random.default_rng(seed)
    tensors = {
        "model.embed_tokens.weight": rng.normal(size=(300, 8)).astype(np.float32),
        "model.norm.weight": rng.normal(size=8).astype(np.float32),
    }
    for block in range(blocks):
        tensors[f"model.layers.{block}.self_attn.q_proj.weight"] = rng.normal(size=(8, 8)).astype(np.float32)
        tensors[f"model.layers.{block}.input_layernorm.weight"] = rng.normal(size=8).astype(np.float16)
        tensors[f"model.layers.{block}.counts"] = rng.integers(0, 9, size=3).astype(np.int8)
    if output:
        tensors["lm_head.weight"] = rng.normal(size=(300, 8)).astype(np.float32)
    return tensors


def write_checkpoint(
    folder: Path, tensors: Tensors | None = None, *, shards: int = 1, config: Mapping[str, object] | None = None
) -> Path:
    """Write a Hugging Face folder; the tensors are dealt out to the shards in turn."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = llama_tensors() if tensors is None else tensors
    (folder / "config.json").write_text(json.dumps({**CONFIG, **(config or {})}, indent=2))
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    weight_map = {}
    for shard in range(shards):
        names = list(tensors)[shard::shards]
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        save_file({name: tensors[name] for name in names}, folder / file)
        weight_map.update(dict.fromkeys(names, file))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder
