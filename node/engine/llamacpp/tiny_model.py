"""A tiny model with random weights of a published one's architecture: as many blocks, a fraction of the width.

Its metadata are the model's own but for the sizes, so that what depends on them (which blocks have a sliding window,
experts, other heads) is as in the model. Every axis of every tensor is one of a few sizes that the metadata state, or
follows from them; where two of these are equal in the model, they are chosen equal here, so that the small axis is
certain whichever of them it is.
"""

import itertools
import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

import numpy as np
from gguf.constants import GGMLQuantizationType

from node.engine.llamacpp.span_file import EMBEDDING
from node.models.gguf_file import GgufError, GgufModel, Value
from node.models.gguf_writer import STRING, U32, GgufData, GgufValue, typed_metadata, write_gguf

_VOCABULARY: Final = 192
_LARGEST_KEPT_AXIS: Final = 8
"""An axis up to this size may be anything, and stays as it is."""

# Options for the sizes, by key of the metadata; the smallest that fits is taken.
_SIZES: Final[Mapping[str, tuple[int, ...]]] = {
    "embedding_length": (64, 96, 128, 160, 256, 32, 512, 1024, 2048),
    "feed_forward_length": (96, 160, 224, 64, 128, 256, 512, 1024, 2048, 4096, 8192),
    "attention.key_length": (16, 32, 8, 64),
    "attention.value_length": (16, 32, 8, 64),
    "attention.q_lora_rank": (40, 64, 96, 160, 32, 128, 256, 512),
    "expert_count": (8, 12, 16, 32, 64, 128),
    "expert_feed_forward_length": (40, 64, 96, 160, 32, 128, 256, 512),
    "expert_shared_feed_forward_length": (48, 40, 64, 96, 160, 128, 256, 512),
}
_SMALLER: Final[Mapping[str, int]] = {
    "attention.sliding_window": 8,
    "attention.chunk_size": 8,
    "expert_used_count": 4,
    "expert_group_count": 4,
    "expert_group_used_count": 2,
}

# Of multi-head latent attention (DeepSeek), whose heads share one compressed key. A part of each head is not rotated.
_RANK: Final = "attention.kv_lora_rank"
_UNROTATED, _ROTATED, _COMPRESSED = 32, 8, 32
_LATENT: Final[Mapping[str, int]] = {"rope": _ROTATED, _RANK: _COMPRESSED}
_LATENT_HEAD_COUNTS: Final = (32, 16, 8, 4)
_LATENT_HEADS: Final = ("key_length", _UNROTATED + _ROTATED), ("value_length", _UNROTATED)

_HEADS: Final = ("attention.head_count", "attention.head_count_kv")


_OPTIONAL_SIZES: Final = (
    "expert_count", "expert_feed_forward_length", "expert_shared_feed_forward_length", "expert_shared_count",
    "attention.q_lora_rank", _RANK, "attention.key_length_mla", "attention.value_length_mla", "nextn_predict_layers",
)  # fmt: skip
_COUNTS: Final = ("expert_shared_count", "nextn_predict_layers")
"""They stay as they are."""


def write_tiny_model(model: GgufModel, path: Path, seed: int = 0) -> None:
    """Write the tiny model. Raises GgufError where a tensor's shape does not follow from the metadata."""
    large, small = _choose_sizes(model)
    axes = dict(zip(_axes(large), _axes(small), strict=True))
    metadata = _metadata(model, large, small)
    tensors = []
    for name, tensor in model.tensors.items():
        shape = tuple(_axis(name, size, axes) for size in tensor.shape)
        data = random_weights(name, shape, seed).astype(np.float32)
        tensors.append(GgufData(name, shape, GGMLQuantizationType.F32, data.tobytes()))
    write_gguf(path, metadata, tensors)


def random_weights(
    name: str, shape: Sequence[int], seed: int = 0
) -> "np.ndarray[tuple[int, ...], np.dtype[np.float64]]":
    """Return weights of a size with which a deep random model neither fades nor explodes, and whose tokens vary."""
    random = np.random.default_rng((zlib.crc32(name.encode()), seed))
    if name.startswith("rope_f"):
        return 1 + 7 * random.random(shape)
    if name.endswith("norm.weight"):
        return 1 + 0.2 * random.standard_normal(shape)
    if len(shape) == 1:
        return 0.1 * random.standard_normal(shape)
    if name == EMBEDDING:  # where it is the head, too, the likeliest token would be the last one again
        return 0.05 * random.standard_normal(shape)
    return random.standard_normal(shape) / math.sqrt(shape[-1])


Sizes = Mapping[str, int]
"""By key of the metadata, without the architecture."""


def _choose_sizes(model: GgufModel) -> tuple[Sizes, Sizes]:
    """Return the model's sizes and the tiny one's, equal where the model's are."""
    large = dict(_stated_sizes(model))
    original = _axes(large)
    fixed = _latent_sizes(large) | {key: large[key] for key in _COUNTS if key in large}
    free = [key for key in _SIZES if key in large and key not in fixed]
    options = itertools.product(*(_SIZES[key] for key in free))
    for shrunk, chosen in itertools.product(_shrunk_heads(large), options):
        small: dict[str, int] = {**shrunk, "vocab_size": _VOCABULARY, **dict(zip(free, chosen, strict=True)), **fixed}
        if "rope" not in fixed:
            small["rope"] = max(2, large["rope"] * small["attention.key_length"] // large["attention.key_length"])
        for hidden in (small["embedding_length"], small["heads"] * small["attention.key_length"]):
            small["embedding_length"] = hidden
            if _is_consistent(original, _axes(small)):
                return large, small
    raise GgufError(f"{model.name} has sizes that its architecture ({model.architecture}) cannot be tried out with")


def _latent_sizes(large: Sizes) -> dict[str, int]:
    """Return the tiny sizes of latent attention, which depend on each other; none for another attention."""
    if _RANK not in large:
        return {}
    if "attention.key_length_mla" not in large:  # an older file, with keys and values of each head
        return {**_LATENT, **{f"attention.{name}": size for name, size in _LATENT_HEADS}}
    whole = {"attention.key_length": _COMPRESSED + _ROTATED, "attention.value_length": _COMPRESSED}
    return {**_LATENT, **whole, **{f"attention.{name}_mla": size for name, size in _LATENT_HEADS}}


def _shrunk_heads(large: Sizes) -> list[Sizes]:
    """Return smaller numbers of heads, the smallest first, with as many to a key and more than one key."""
    heads, kv_heads = large["heads"], large["kv_heads"]
    if _RANK in large:
        return [{"heads": each, "kv_heads": 1 if kv_heads == 1 else each} for each in _LATENT_HEAD_COUNTS]
    divisors = [
        each
        for each in range(kv_heads, 0, -1)
        if heads % each == kv_heads % each == 0 and kv_heads // each >= min(2, kv_heads)
    ]
    return [{"heads": heads // each, "kv_heads": kv_heads // each} for each in divisors]


def _is_consistent(large: Sequence[int], small: Sequence[int]) -> bool:
    """Return whether equal sizes stay equal; kept ones are what they were."""
    seen: dict[int, int] = {}
    return all(seen.setdefault(one, other) == other for one, other in zip(large, small, strict=True))


def _stated_sizes(model: GgufModel) -> Iterator[tuple[str, int]]:
    hidden, heads = model.integer("embedding_length"), _largest(model.get("attention.head_count"), 1)
    head_size = model.integer("attention.key_length", max(1, hidden // heads))
    yield "heads", heads
    yield "kv_heads", _largest(model.get("attention.head_count_kv"), heads)
    yield "vocab_size", model.tensors[EMBEDDING].shape[0]
    yield "embedding_length", hidden
    yield "attention.key_length", head_size
    yield "attention.value_length", model.integer("attention.value_length", head_size)
    yield "rope", model.integer("rope.dimension_count", head_size)
    if (inner := _largest(model.get("feed_forward_length"), 0)) > 0:
        yield "feed_forward_length", inner
    for key in _OPTIONAL_SIZES:
        if isinstance(value := model.get(key), int) and value > 0:
            yield key, value


def _largest(value: Value | None, default: int) -> int:
    """Return the largest of the blocks' sizes."""
    listed = value if isinstance(value, list) else [value]
    return max((each for each in listed if isinstance(each, int)), default=default) or default


def _axes(sizes: Sizes) -> list[int]:
    """Return every size that an axis may have, in a fixed order."""
    hidden, key, value = sizes["embedding_length"], sizes["attention.key_length"], sizes["attention.value_length"]
    heads, kv_heads = sizes["heads"], sizes["kv_heads"]
    inner = sizes.get("feed_forward_length", hidden)
    experts = sizes.get("expert_count", hidden)
    expert_inner = sizes.get("expert_feed_forward_length", inner)
    rank = sizes.get(_RANK, hidden)
    if _RANK in sizes:
        key, value = (
            sizes.get(f"attention.{name}_mla", size) for name, size in (("key_length", key), ("value_length", value))
        )
    return [
        hidden,
        sizes["vocab_size"],
        heads * key,
        heads * value,
        kv_heads * key,
        kv_heads * value,
        heads * key + kv_heads * (key + value),
        key,
        value,
        sizes["rope"] // 2,
        inner,
        2 * inner,
        experts,
        expert_inner,
        sizes.get("expert_shared_feed_forward_length", inner),
        expert_inner * sizes.get("expert_shared_count", 1),
        heads,
        sizes.get("attention.q_lora_rank", hidden),
        rank,
        *((rank + sizes["rope"], key - sizes["rope"], heads * (key - sizes["rope"] + value)) if _RANK in sizes else ()),
        # What predicts a further token takes a hidden state and an embedding.
        *((2 * hidden,) if "nextn_predict_layers" in sizes else ()),
    ]


def _axis(name: str, size: int, axes: Mapping[int, int]) -> int:
    if size in axes:
        return axes[size]
    if size <= _LARGEST_KEPT_AXIS:
        return size
    raise GgufError(f"tensor {name[:80]!r} has an axis of {size}, which does not follow from the metadata")


def _metadata(model: GgufModel, large: Sizes, small: Sizes) -> dict[str, GgufValue]:
    """Return the model's metadata with the tiny model's sizes."""
    prefix = f"{model.architecture}."
    sizes = {**small, "rope.dimension_count": small["rope"], "rope.dimension_count_swa": small["rope"]}
    found: dict[str, GgufValue] = {}
    for name, stated in typed_metadata(model).items():
        key = name.removeprefix(prefix)
        if name.startswith(("tokenizer.", "split.")):
            continue
        if key in _HEADS or key in sizes:
            shrunk = {"attention.head_count": "heads", "attention.head_count_kv": "kv_heads"}.get(key, key)
            stated = stated._replace(value=_shrunk(stated.value, large.get(shrunk, 0), sizes[shrunk]))
        elif key in _SMALLER and isinstance(stated.value, int):
            stated = stated._replace(value=min(stated.value, _SMALLER[key]))
        found[name] = stated
    found |= {"tokenizer.ggml.model": GgufValue("no_vocab", STRING), f"{prefix}vocab_size": GgufValue(_VOCABULARY, U32)}
    return found


def _shrunk(value: Value, large: int, small: int) -> Value:
    """Return a size, or one for each block, in proportion."""
    if isinstance(value, list):
        return [_shrunk(each, large, small) for each in value]
    if not isinstance(value, int) or value == large or not large:
        return small
    return max(1, value * small // large) if value else 0
