"""A Llama of any shape with random weights as a GGUF file, in Q4_0 as they are published: with a head in Q6_K.

The weights are of a size with which activations neither fade nor explode, so that logits are finite and texts vary. It
is written as a stream: a file of many gigabytes takes a few megabytes of memory.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final

import gguf
import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

Q4_0: Final = GGMLQuantizationType.Q4_0
Q6_K: Final = GGMLQuantizationType.Q6_K
F32: Final = GGMLQuantizationType.F32
_CHUNK_BLOCKS: Final = 1 << 16
_ALIGNMENT: Final = 32


@dataclass(frozen=True, slots=True)
class LlamaShape:
    """The sizes of a Llama; its rows are multiples of 256, as Q6_K needs them."""

    blocks: int
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    vocabulary: int
    context: int = 8192

    @property
    def tensors(self) -> dict[str, tuple[int, ...]]:
        """The shape of each tensor, in the order of the file."""
        hidden, kv = self.hidden, self.hidden // self.heads * self.kv_heads
        found: dict[str, tuple[int, ...]] = {"token_embd.weight": (self.vocabulary, hidden)}
        for block in range(self.blocks):
            of_block = {
                "attn_norm": (hidden,),
                "attn_q": (hidden, hidden),
                "attn_k": (kv, hidden),
                "attn_v": (kv, hidden),
                "attn_output": (hidden, hidden),
                "ffn_norm": (hidden,),
                "ffn_gate": (self.inner, hidden),
                "ffn_up": (self.inner, hidden),
                "ffn_down": (hidden, self.inner),
            }
            found |= {f"blk.{block}.{name}.weight": shape for name, shape in of_block.items()}
        return found | {"output_norm.weight": (hidden,), "output.weight": (self.vocabulary, hidden)}

    @property
    def metadata(self) -> dict[str, Any]:
        """The keys of the architecture, without the tokenizer's."""
        return {
            "context_length": self.context,
            "embedding_length": self.hidden,
            "block_count": self.blocks,
            "feed_forward_length": self.inner,
            "attention.head_count": self.heads,
            "attention.head_count_kv": self.kv_heads,
            "attention.layer_norm_rms_epsilon": 1e-5,
            "rope.freq_base": 500000.0,
            "rope.dimension_count": self.hidden // self.heads,
            "vocab_size": self.vocabulary,
        }


LLAMA_8B: Final = LlamaShape(blocks=32, hidden=4096, inner=14336, heads=32, kv_heads=8, vocabulary=128256)
"""The shape of Llama 3.1 8B."""


def kind_of(name: str, shape: tuple[int, ...]) -> GGMLQuantizationType:
    """Return the type in which a tensor is written."""
    if len(shape) == 1:
        return F32
    return Q6_K if name == "output.weight" else Q4_0


def tensor_bytes(name: str, shape: tuple[int, ...]) -> int:
    """Return the bytes of a tensor in the file."""
    per_block, block_bytes = GGML_QUANT_SIZES[kind_of(name, shape)]
    return math.prod(shape) // per_block * block_bytes


def write_llama(path: Path, shape: LlamaShape, seed: int = 0) -> Path:
    """Write the file."""
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in shape.metadata.items():
        add = writer.add_float32 if isinstance(value, float) else writer.add_uint32
        add(f"llama.{key}", value)
    _add_tokenizer(writer, shape.vocabulary)
    for name, axes in shape.tensors.items():
        kind, size = kind_of(name, axes), tensor_bytes(name, axes)
        if kind is F32:
            writer.add_tensor_info(name, list(axes), np.dtype(np.float32), size)
        else:
            rows = [axes[0], size // axes[0]]
            writer.add_tensor_info(name, rows, np.dtype(np.uint8), size, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    random = np.random.default_rng(seed)
    with path.open("r+b") as file:
        file.seek(0, 2)
        _pad(file)
        for name, axes in shape.tensors.items():
            for data in _values(name, axes, random):
                file.write(data)
            _pad(file)
    return path


def _pad(file: BinaryIO) -> None:
    file.write(bytes(-file.tell() % _ALIGNMENT))


def _values(name: str, shape: tuple[int, ...], random: np.random.Generator) -> Iterator[bytes]:
    kind = kind_of(name, shape)
    if kind is F32:
        yield (1 + 0.2 * random.standard_normal(shape)).astype(np.float32).tobytes()
        return
    per_block, block_bytes = GGML_QUANT_SIZES[kind]
    size = 1.0 if name == "token_embd.weight" else 1 / math.sqrt(shape[-1])
    # The standard deviation of what the quants stand for: uniform from -8 to 7, or from -32 to 31 times the scales.
    scale = np.array([size / (4.6 if kind is Q4_0 else 18.5 * 16)], np.float16).view(np.uint8)
    left = math.prod(shape) // per_block
    while left:
        blocks = random.integers(0, 256, (min(left, _CHUNK_BLOCKS), block_bytes), np.uint8)
        if kind is Q4_0:
            blocks[:, :2] = scale
        else:
            blocks[:, 192:208], blocks[:, 208:] = 16, scale
        left -= len(blocks)
        yield blocks.tobytes()


def _add_tokenizer(writer: gguf.GGUFWriter, count: int) -> None:
    letters = [chr(code) for code in range(ord("!"), ord("~") + 1)]
    tokens = ["<|begin_of_text|>", "<|end_of_text|>", *letters, "ab"]
    tokens += [f"<|unused_{number}|>" for number in range(count - len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token.startswith("<|") else 1 for token in tokens])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
