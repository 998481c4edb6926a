"""The file of a package that a tensor of a checkpoint belongs to, by its name.

A package has one file per transformer block, so that a peer fetches and maps only what it serves, and two more: `embed`
turns token ids into the first block's input, `head` the last block's output into logits. One of GGUF files has a
further one, `common`, which every span needs (`gguf_layout` has the names of GGUF). The few naming conventions of
architectures in transformers are listed here and nowhere else.
"""

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Final, Literal

Part = int | Literal["embed", "head"]
"""A block's number, or one of the two parts around the blocks."""

SAFETENSORS: Final = "safetensors"
GGUF: Final = "gguf"
"""What the weight files of a package are, and how their names end."""

# A decoder's tensors may stand bare (GPT-2 and Bloom on their hub pages) or under any nesting of these modules.
_DECODER = r"(?:(?:model|transformer|gpt_neox|gpt_neox_japanese|biogpt|decoder|language_model)\.)*"

_BLOCK = re.compile(_DECODER + r"(?:layers|h|blocks)\.(\d{1,6})\.(?P<rest>.+)")
_HEAD = re.compile(
    _DECODER
    + r"(?:lm_head|embed_out|norm|ln_f|norm_f|final_norm|final_layer_norm|final_layernorm|project_out)\.[a-z_]+"
)
_OUTPUT_MATRIX = re.compile(_DECODER + r"(?:lm_head|embed_out)\.weight")
_INPUT_MATRIX = re.compile(_DECODER + r"(?:embed_tokens|wte|word_embeddings|embed_in)\.weight")

# Encoders that a multimodal checkpoint carries beside its decoder. They have `layers.N` of their own.
_OTHER_MODALITY = re.compile(
    r"(?:model\.)?(?:vision|visual|audio|image|multi_modal|embed_vision|embed_audio)[a-z_]*\..+"
)

# Constants that old checkpoints stored (causal masks, rotary frequencies); models compute them, and transformers
# ignores them on loading. GPT-2's masks alone would add 4 MiB to every block.
_CONSTANT = re.compile(r"(?:attn|attention)\.(?:bias|masked_bias)|.*rotary_emb\.inv_freq")


# Blocks in checkpoints and in GGUF files.
_NUMBERED = re.compile(r"(?:.*?\.)?(?:blk|layers|h|blocks)\.(\d{1,6})\.")
_SHOWN = 4


@dataclass(frozen=True, slots=True)
class Layout:
    """The tensor names of each file of a package, each sorted."""

    embed: tuple[str, ...]
    head: tuple[str, ...]
    blocks: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, slots=True)
class OuterNames:
    """The modules before and behind the blocks, as the engine found by tracing the architecture's own code.

    Without the modules that they are nested in, which differ between checkpoints. `output`: the one whose matrix makes
    logits, `input`: the one whose matrix embeds token ids, if any. Other modules are assigned by name.
    """

    embed: frozenset[str] = frozenset()
    head: frozenset[str] = frozenset()
    output: str = ""
    input: str = ""

    def part_of(self, tensor: str) -> Part | None:
        """Return the part that a tensor belongs to, or None for one that no decoder needs."""
        part = part_of(tensor)
        if not isinstance(part, str):
            return part
        owner = _owner(tensor)
        return "head" if owner in self.head else "embed" if owner in self.embed else part

    def is_output_matrix(self, tensor: str) -> bool:
        """Whether a tensor is the matrix that makes logits."""
        return _OUTPUT_MATRIX.fullmatch(tensor) is not None or self._is_matrix_of(self.output, tensor)

    def is_input_matrix(self, tensor: str) -> bool:
        """Whether a tensor is the matrix that embeds token ids."""
        return _INPUT_MATRIX.fullmatch(tensor) is not None or self._is_matrix_of(self.input, tensor)

    @staticmethod
    def _is_matrix_of(module: str, tensor: str) -> bool:
        return bool(module) and tensor.endswith(".weight") and _owner(tensor) == module


BY_NAME: Final = OuterNames()
"""For the architectures whose modules have the usual names."""

TESTED: Final = frozenset({"llama", "mistral", "qwen2", "qwen3"})
"""Architectures without a test at import: the engine's tests cover them, and their modules have the usual names."""


def module_of(path: str) -> str:
    """Return a module's name without those it is nested in, which differ from checkpoint to checkpoint."""
    return re.sub(_DECODER, "", path, count=1)


def _owner(tensor: str) -> str:
    return module_of(tensor.rpartition(".")[0])


def part_of(tensor: str) -> Part | None:
    """Return the part that a tensor belongs to, or None for one that no decoder needs."""
    if _OTHER_MODALITY.fullmatch(tensor):
        return None
    block = _BLOCK.fullmatch(tensor)
    if block is not None:
        return None if _CONSTANT.fullmatch(block["rest"]) else int(block[1])
    if _HEAD.fullmatch(tensor):
        return "head"
    return None if tensor.endswith("rotary_emb.inv_freq") else "embed"


def arrange(tensors: Iterable[str], block_count: int, *, tied: bool, names: OuterNames = BY_NAME) -> Layout:
    """Return which tensors go into which file.

    Blocks from `block_count` on are left out: some checkpoints append layers for multi-token prediction that the
    decoder does not run. With `tied` embeddings the output matrix is the input matrix, so a copy of it stored beside
    is left out, too, and the last stage needs `embed` as well as `head`. Raises ValueError when a part is missing.
    """
    parts: defaultdict[Part, list[str]] = defaultdict(list)
    for tensor in tensors:
        part = names.part_of(tensor)
        if part is not None and not (tied and names.is_output_matrix(tensor)):
            parts[part].append(tensor)
    missing = next((block for block in range(block_count) if block not in parts), None)
    if missing is not None:
        raise ValueError(f"it has no tensors of block {missing}, where {block_count} blocks are expected")
    if "embed" not in parts:
        raise ValueError("it has no token embedding")
    return Layout(
        embed=tuple(sorted(parts["embed"])),
        head=tuple(sorted(parts["head"])),
        blocks=tuple(tuple(sorted(parts[block])) for block in range(block_count)),
    )


def output_matrix(tensors: Iterable[str], names: OuterNames = BY_NAME) -> str | None:
    """Return the name of the matrix that makes logits, if it is stored."""
    return next(filter(names.is_output_matrix, sorted(tensors)), None)


def input_matrix(tensors: Iterable[str], names: OuterNames = BY_NAME) -> str | None:
    """Return the name of the matrix that embeds token ids, if it is known."""
    return next(filter(names.is_input_matrix, sorted(tensors)), None)


def block_file(block: int, weights: str = SAFETENSORS) -> str:
    """Return the name of a block's file."""
    return f"block-{block:03d}.{weights}"


def part_file(part: Literal["common", "embed", "head"], weights: str = SAFETENSORS) -> str:
    """Return the name of a file beside those of the blocks."""
    return f"{part}.{weights}"


def describe_tensors(names: Iterable[str]) -> str:
    """Return tensors in a few words: those of blocks by block, of the others the first ones."""
    blocks: defaultdict[int, list[str]] = defaultdict(list)
    others: list[str] = []
    for name in names:
        block = _NUMBERED.match(name)
        if block is None:
            others.append(name)
        else:
            blocks[int(block[1])].append(name)
    shown = []
    if blocks:
        numbers = sorted(blocks)
        runs = [str(numbers[0])]
        for before, number in pairwise(numbers):
            if number != before + 1:
                runs.append(str(number))
            elif "-" in runs[-1]:
                runs[-1] = f"{runs[-1].partition('-')[0]}-{number}"
            else:
                runs[-1] += f"-{number}"
        example = min(blocks[numbers[0]])
        many = "s" if len(numbers) > 1 else ""
        shown.append(f"tensors of block{many} {', '.join(runs[:8])} ({example[:100]}, …)")
    shown += [f"{name[:100]}" for name in others[:_SHOWN]]
    more = f" and {len(others) - _SHOWN} more" if len(others) > _SHOWN else ""
    return ", ".join(shown) + more
