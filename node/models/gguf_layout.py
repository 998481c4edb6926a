"""Which file of a package a GGUF model's tensor or key of metadata belongs to.

Tensors keep their names, types and bytes. Of the metadata `common` has what llama.cpp builds the model of, and nothing
that only describes the file: the same weights under another name, or from another upload, are the same model.
"""

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from node.models.gguf_file import GgufError, GgufModel
from node.models.layout import Part, describe_tensors
from protocol.limits import MAX_BLOCKS

_BLOCK = re.compile(r"blk\.(\d{1,6})\.(?P<rest>.+)")

# Outside of the blocks, by the name before the first point.
_PARTS: Final[Mapping[str, str]] = {
    **dict.fromkeys(
        ("altup_proj", "per_layer_model_proj", "per_layer_proj_norm", "per_layer_token_embd", "position_embd",
         "token_embd", "token_embd_norm", "token_types"),
        "embed",
    ),
    **dict.fromkeys(("altup_unembd_proj", "output", "output_norm"), "head"),
    **dict.fromkeys(("rope_factors_long", "rope_factors_short", "rope_freqs"), "common"),
}  # fmt: skip

# A state that is not keys and values by position: it can neither be cut back nor shared between texts.
_RECURRENT: Final = ("channel_mix_", "shortconv", "ssm_", "time_mix_")

_KEPT_KEYS: Final = frozenset({"general.architecture", "general.quantization_version"})

LONG_FACTORS: Final = "rope_factors_long.weight"
SHORT_FACTORS: Final = "rope_factors_short.weight"
INPUT_MATRIX: Final = "token_embd.weight"
OUTPUT_MATRIX: Final = "output.weight"


@dataclass(frozen=True, slots=True)
class GgufLayout:
    """The tensor names of each file of a package, each sorted."""

    common: tuple[str, ...]
    embed: tuple[str, ...]
    head: tuple[str, ...]
    blocks: tuple[tuple[str, ...], ...]


def arrange(model: GgufModel, block_count: int) -> GgufLayout:
    """Return which tensors go into which file. Raises GgufError for tensors of unknown use, and for missing ones."""
    if not 0 < block_count <= MAX_BLOCKS:
        raise GgufError(f"{model.name} has {block_count} blocks, where 1 to {MAX_BLOCKS} are possible")
    parts: defaultdict[Part | str, list[str]] = defaultdict(list)
    unknown: list[str] = []
    for name in model.tensors:
        block = _BLOCK.fullmatch(name)
        part = _PARTS.get(name.partition(".")[0]) if block is None else int(block[1])
        if block is not None and block["rest"].startswith(_RECURRENT):
            raise GgufError(
                f"{model.name} has tensor {name[:100]}: a model with a state beside keys and values cannot be served "
                "in spans here"
            )
        if part is None or (isinstance(part, int) and part >= block_count):
            unknown.append(name)
        else:
            parts[part].append(name)
    if unknown:
        raise GgufError(
            f"{model.name} has {describe_tensors(unknown)}, whose use in a {model.architecture[:80]} model of "
            f"{block_count} blocks is unknown here"
        )
    missing = [f"blk.{block}.*" for block in range(block_count) if block not in parts]
    missing += [name for name in (INPUT_MATRIX,) if name not in model.tensors]
    if missing:
        raise GgufError(f"{model.name} lacks {describe_tensors(missing)}: it is not the whole model")
    return GgufLayout(
        common=tuple(sorted(parts["common"])),
        embed=tuple(sorted(parts["embed"])),
        head=tuple(sorted(parts["head"])),
        blocks=tuple(tuple(sorted(parts[block])) for block in range(block_count)),
    )


def keys_of_model(model: GgufModel) -> tuple[str, ...]:
    """Return the keys of the metadata that describe the model, sorted: those of `common`."""
    prefix = f"{model.architecture}."
    return tuple(sorted(key for key in model.metadata if key.startswith(prefix) or key in _KEPT_KEYS))
