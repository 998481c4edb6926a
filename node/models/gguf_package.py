"""A GGUF model as the files of a package: each a GGUF file of its own, with tensors and metadata copied as they are.

The order of keys and tensors and the alignment are fixed, so that the same weights give the same bytes, and the same
id, however the model was split into files and whatever else its metadata say.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from node.models.gguf_config import block_count, read_config, token_ids
from node.models.gguf_file import GgufError, GgufModel, GgufTensor, shorten
from node.models.gguf_layout import arrange, keys_of_model
from node.models.gguf_metadata import check_namespaces
from node.models.gguf_writer import GgufValue, size_of_gguf, typed_metadata, write_gguf
from node.models.layout import GGUF, block_file, part_file
from node.models.manifest import Json
from node.models.safetensors_file import Written

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True, slots=True)
class GgufPart:
    """A file of the package, whose tensors lie elsewhere."""

    metadata: Mapping[str, GgufValue]
    tensors: tuple[GgufTensor, ...]

    @property
    def size_bytes(self) -> int:
        """The size of the file."""
        return size_of_gguf(self.metadata, self.tensors)

    def write(self, path: Path | None, on_bytes: Callable[[int], None]) -> Written:
        """Write the file, flushed to the disk, or only hash it if `path` is None; return size and sha256.

        `on_bytes` is called with the size of each piece of a tensor. Raises OSError.
        """
        return write_gguf(path, self.metadata, self.tensors, on_bytes)


@dataclass(frozen=True, slots=True)
class GgufPackage:
    """What a package of a GGUF model consists of, beside its tokenizer: see `Manifest`."""

    config: dict[str, Json]
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    parts: Mapping[str, GgufPart]


def arrange_package(model: GgufModel) -> GgufPackage:
    """Return the package of a model. Raises GgufError for a model that cannot be served in spans."""
    if _NAME.fullmatch(model.architecture) is None:
        raise GgufError(f"{model.name} is damaged: its general.architecture is {shorten(model.architecture)}")
    check_namespaces(model)
    layout = arrange(model, block_count(model))
    stated = typed_metadata(model)
    described = {key: stated[key] for key in keys_of_model(model)}
    name_only = {key: described[key] for key in described if key == "general.architecture"}
    files = {part_file("embed", GGUF): layout.embed, part_file("head", GGUF): layout.head}
    files |= {block_file(block, GGUF): tensors for block, tensors in enumerate(layout.blocks)}
    common = GgufPart(described, tuple(model.tensors[name] for name in layout.common))
    parts = {part_file("common", GGUF): common}
    parts |= {file: GgufPart(name_only, tuple(model.tensors[name] for name in names)) for file, names in files.items()}
    return GgufPackage(read_config(model), *token_ids(model), parts)
