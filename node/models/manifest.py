"""The manifest of a model package: its config and its files. Its sha256 is the model's id.

It contains no versions, times or paths, so that every import of the same source gives the same id. Manifests come from
remote peers, too: `parse_manifest` trusts nothing, and every file name is one of a closed set.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, Final, TypeAlias

from node.models.errors import ManifestError
from node.models.layout import GGUF, SAFETENSORS, block_file, part_file
from protocol import fields
from protocol.canonical import canonical_json
from protocol.errors import RemoteProtocolError
from protocol.forms import Name, TokenId
from protocol.identity import BlockRange, ModelId
from protocol.limits import (
    MAX_BLOB_BYTES,
    MAX_BLOCKS,
    MAX_MANIFEST_BYTES,
    MAX_NAME_BYTES,
    MAX_STOP_TOKENS,
    MAX_VOCABULARY,
    MAX_WIDTH,
)
from protocol.schema import OMIT_DEFAULT, Count, Form, Key, Nullable, Range, from_map, to_map
from selector.cuts import Cuts

Json: TypeAlias = "bool | int | float | str | list[Json] | dict[str, Json] | None"
"""A value as json.loads returns it."""

_FORMATS: Final[Mapping[str, int | str]] = {SAFETENSORS: 1, GGUF: GGUF}
"""How a manifest states its format: the first one by a number, which the ids of its packages depend on."""

MANIFEST_FILE: Final = "manifest.json"
TOKENIZER_FILE: Final = "tokenizer.json"
TOKENIZER_CONFIG_FILE: Final = "tokenizer_config.json"
CHAT_TEMPLATE_FILE: Final = "chat_template.jinja"
TOKENIZER_FILES: Final = (CHAT_TEMPLATE_FILE, TOKENIZER_FILE, TOKENIZER_CONFIG_FILE)
"""The files that a package may have for its tokenizer, in the manifest's order."""

MAX_TOKENIZER_BYTES: Final[Mapping[str, int]] = {
    CHAT_TEMPLATE_FILE: 1 << 20,
    TOKENIZER_FILE: 64 << 20,
    TOKENIZER_CONFIG_FILE: 16 << 20,
}
"""Size of each tokenizer file: it is read into memory whole. The largest in use have a half of that."""

_MAX_CONFIG_DEPTH = 8
_MAX_CONFIG_INTEGER = 1 << 53
_SHA256 = re.compile(r"[0-9a-f]{64}")

# How the config was written and run, which does not describe the model. `auto_map` names code outside of the package,
# which is never run.
_VOLATILE_KEYS = frozenset({
    "_attn_implementation", "_attn_implementation_autoset", "_commit_hash", "_name_or_path", "attn_implementation",
    "auto_map", "name_or_path", "transformers_version",
})  # fmt: skip
_BLOCK_COUNT_KEYS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_HIDDEN_SIZE_KEYS = ("hidden_size", "n_embd", "d_model")
_LONG_ROPE_TYPES = frozenset({"longrope", "su"})
_POSITIONS_KEYS = ("max_position_embeddings", "n_positions", "seq_length", "max_seq_len")


def _format(value: object, _what: str) -> str:
    for name, stated in _FORMATS.items():
        if value == stated and type(value) is type(stated):
            return name
    known = " and ".join(map(str, _FORMATS.values()))
    raise RemoteProtocolError(f"format {str(value)[:20]} is unknown here; formats {known} are")


def _sha256(value: object, what: str) -> str:
    if type(value) is not str or _SHA256.fullmatch(value) is None:
        raise RemoteProtocolError(f"{what} is not valid: expected 64 hexadecimal digits")
    return value


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One file of a package. `sha256` is 64 lower-case hexadecimal digits and the file's name on the wire."""

    name: Name
    size_bytes: Annotated[int, Range(1, MAX_BLOB_BYTES), Key("size")]
    sha256: Annotated[str, Form(_sha256)]

    def check_name(self, *names: str) -> None:
        """Raise RemoteProtocolError unless the file has one of these names, and at most the size for its name."""
        if self.name not in names:
            raise RemoteProtocolError(f"file name {self.name[:80]!r} where {' or '.join(names)} is expected")
        fields.integer(self.size_bytes, 1, MAX_TOKENIZER_BYTES.get(self.name, MAX_BLOB_BYTES), "file size")


@dataclass(frozen=True, slots=True)
class _Generation:
    bos_token_id: Nullable[TokenId]
    eos_token_ids: Annotated[tuple[TokenId, ...], Count(MAX_STOP_TOKENS)]


@dataclass(frozen=True, slots=True)
class _Document:
    """A manifest as JSON."""

    format: Annotated[str, Form(_format, _FORMATS.__getitem__)]
    config: Annotated[Mapping[str, Json], Form(lambda value, _what: _config(value))]
    generation: _Generation
    tokenizer: Annotated[tuple[FileEntry, ...], Count(len(TOKENIZER_FILES))]
    embed: FileEntry
    head: FileEntry
    blocks: Annotated[tuple[FileEntry, ...], Count(MAX_BLOCKS, 1)]
    common: FileEntry | None = None
    granularity: Annotated[int, Range(1, MAX_BLOCKS), OMIT_DEFAULT] = 1

    def check(self) -> None:
        """Raise RemoteProtocolError for other files than a package has, and for a config of other blocks."""
        for file in self.tokenizer:
            file.check_name(*TOKENIZER_FILES)
        names = [file.name for file in self.tokenizer]
        if names != sorted(set(names)):
            raise RemoteProtocolError("tokenizer files out of order")
        if (self.common is None) is (self.format == GGUF):
            raise RemoteProtocolError(
                f"a manifest of {self.format} files {'lacks' if self.common is None else 'has'} 'common'"
            )
        if self.common is not None:
            self.common.check_name(part_file("common", self.format))
        self.embed.check_name(part_file("embed", self.format))
        self.head.check_name(part_file("head", self.format))
        for block, file in enumerate(self.blocks):
            file.check_name(block_file(block, self.format))
        described = block_count_of(self.config)
        if described != len(self.blocks):
            raise RemoteProtocolError(f"config describes {described} blocks, not {len(self.blocks)}")
        if self.granularity > len(self.blocks):
            raise RemoteProtocolError(f"granularity {self.granularity} exceeds the {len(self.blocks)} blocks")


@dataclass(frozen=True)
class Manifest:
    """A model's `config`, as in its config.json, the token ids that begin and end a text, and its files.

    `config` always has `tie_word_embeddings`: whether the last stage takes its output matrix from `embed`. It has the
    names of transformers in either `format`, which is that of the weight files. `common`: in a package of GGUF files
    the one that every span needs. The model may be cut into spans at multiples of `granularity` blocks only.
    """

    config: Mapping[str, Json]
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    tokenizer_files: tuple[FileEntry, ...]
    embed: FileEntry
    head: FileEntry
    blocks: tuple[FileEntry, ...]
    common: FileEntry | None = None
    granularity: int = 1
    format: str = SAFETENSORS

    @cached_property
    def data(self) -> bytes:
        """The manifest's canonical bytes."""
        generation = _Generation(self.bos_token_id, self.eos_token_ids)
        files = (self.tokenizer_files, self.embed, self.head, self.blocks, self.common)
        return canonical_json(to_map(_Document(self.format, self.config, generation, *files, self.granularity)))

    @cached_property
    def model_id(self) -> ModelId:
        """The sha256 of the canonical bytes."""
        return ModelId(hashlib.sha256(self.data).hexdigest())

    def has_tokens_of(self, other: "Manifest") -> bool:
        """Whether a token id means the same text to both models."""
        own, others = (
            [file.sha256 for file in manifest.tokenizer_files if file.name == TOKENIZER_FILE]
            for manifest in (self, other)
        )
        return self.model_id == other.model_id or bool(own and own == others)

    @property
    def block_count(self) -> int:
        """Blocks of the whole model."""
        return len(self.blocks)

    @property
    def cuts(self) -> Cuts:
        """Where the model may be cut into spans."""
        return Cuts(self.block_count, self.granularity)

    @property
    def tied(self) -> bool:
        """Whether the matrix that embeds tokens is also the one that makes logits."""
        return self.config["tie_word_embeddings"] is True

    @property
    def model_type(self) -> str:
        """The architecture's name in transformers, or in llama.cpp where transformers does not know it."""
        return str(self.config["model_type"])

    @property
    def hidden_size(self) -> int | None:
        """Elements of one row of hidden states, if stated."""
        return find_integer(self.config, _HIDDEN_SIZE_KEYS)

    @property
    def vocabulary_size(self) -> int | None:
        """Token ids are below this, if stated."""
        return find_integer(self.config, ("vocab_size",))

    @property
    def max_positions(self) -> int | None:
        """The longest text in tokens, if stated."""
        return longest_text(self.config, self.format)

    @property
    def files(self) -> tuple[FileEntry, ...]:
        """Every file of the whole package except the manifest."""
        return (*self.tokenizer_files, *self.weight_files)

    @property
    def weight_files(self) -> tuple[FileEntry, ...]:
        """The files with tensors."""
        return (*self._common, self.embed, *self.blocks, self.head)

    @property
    def size_bytes(self) -> int:
        """Bytes of the whole package except the manifest."""
        return sum(file.size_bytes for file in self.files)

    def files_for(self, blocks: BlockRange) -> tuple[FileEntry, ...]:
        """Return the weight files that a peer needs to serve these blocks; raise ModelError beyond the last block."""
        if blocks.end > self.block_count:
            raise ManifestError(f"the model has blocks 0-{self.block_count}, not {blocks}")
        first, last = blocks.start == 0, blocks.end == self.block_count
        return (
            *self._common,
            *((self.embed,) if first or (last and self.tied) else ()),
            *self.blocks[blocks.start : blocks.end],
            *((self.head,) if last else ()),
        )

    @property
    def _common(self) -> tuple[FileEntry, ...]:
        return () if self.common is None else (self.common,)

    def bytes_of(self, blocks: BlockRange) -> int:
        """Return how many bytes of weights a peer needs to serve these blocks."""
        return sum(file.size_bytes for file in self.files_for(blocks))


def parse_manifest(data: bytes) -> Manifest:
    """Return the manifest of bytes from anywhere; raise ManifestError, and nothing else, for any others."""
    if len(data) > MAX_MANIFEST_BYTES:
        raise ManifestError(f"bad manifest: {len(data)} bytes exceed {MAX_MANIFEST_BYTES}")
    try:
        document = from_map(_Document, json.loads(data), "manifest")
        manifest = Manifest(
            config=document.config,
            bos_token_id=document.generation.bos_token_id,
            eos_token_ids=document.generation.eos_token_ids,
            tokenizer_files=document.tokenizer,
            embed=document.embed,
            head=document.head,
            blocks=document.blocks,
            common=document.common,
            granularity=document.granularity,
            format=document.format,
        )
        is_canonical = manifest.data == data
    except (ValueError, RecursionError, RemoteProtocolError) as error:
        raise ManifestError(f"bad manifest: {error}") from None
    if not is_canonical:
        raise ManifestError("bad manifest: not in canonical form")
    return manifest


def normalise_config(config: Mapping[str, Json]) -> dict[str, Json]:
    """Return a config.json's content without keys that do not describe the model."""
    normal: dict[str, Json] = {}
    for key, value in config.items():
        if key in _VOLATILE_KEYS:
            continue
        if key in {"torch_dtype", "dtype"}:
            normal["dtype"] = value.removeprefix("torch.") if isinstance(value, str) else value
        else:
            normal[key] = normalise_config(value) if isinstance(value, dict) else value
    return normal


def block_count_of(config: Mapping[str, Json]) -> int | None:
    """Return the number of blocks, if the config states it."""
    return find_integer(config, _BLOCK_COUNT_KEYS)


def longest_text(config: Mapping[str, Json], package_format: str) -> int | None:
    """Return the longest text of a model in tokens, if stated.

    In a GGUF package the rotary frequencies never depend on the length of a text: llama.cpp chooses them once.
    """
    return find_integer(config, _POSITIONS_KEYS) if package_format == GGUF else constant_positions(config)


def constant_positions(config: Mapping[str, Json]) -> int | None:
    """Return the length up to which the KV cache of a text does not depend on its length, if stated.

    That is the context length, except for rotary frequencies that change with the length of the text (LongRoPE, dynamic
    NTK): beyond, cached keys differ from those of `generate`, and chunked prefill from a prompt in one piece.
    """
    decoder = config.get("text_config")
    parts = (config, decoder if isinstance(decoder, dict) else {})
    limits = [find_integer(config, _POSITIONS_KEYS)]
    for part in parts:
        limits += [
            find_integer({**scaling, **part}, ("original_max_position_embeddings",))
            for rope in (part.get("rope_parameters"), part.get("rope_scaling"))
            if isinstance(rope, dict)
            for scaling in (rope, *rope.values())  # one for all blocks, or one for each kind of blocks
            if isinstance(scaling, dict) and str(scaling.get("rope_type", scaling.get("type"))) in _LONG_ROPE_TYPES
        ]
    return min((limit for limit in limits if limit is not None), default=None)


def architecture_name(model_type: str) -> str:
    """Return the usual name of an architecture: Qwen3-Next for qwen3_next."""
    words = re.split("[-_]", model_type.removesuffix("_text"))
    return "-".join(word.capitalize() if re.search("[aeiou]", word) else word.upper() for word in words)


def find_integer(config: Mapping[str, Json], keys: tuple[str, ...]) -> int | None:
    """Return the first integer under one of the keys, in the config or in its decoder's part of it."""
    decoder = config.get("text_config")
    for part in (config, decoder if isinstance(decoder, dict) else {}):
        for key in keys:
            value = part.get(key)
            if type(value) is int:
                return value
    return None


def _config(value: Any) -> dict[str, Json]:
    if not isinstance(value, dict) or not value:
        raise ValueError("config is not an object")
    _check_config_value(value, _MAX_CONFIG_DEPTH)
    model_type = value.get("model_type")
    if not isinstance(model_type, str) or not 0 < len(model_type) <= MAX_NAME_BYTES:
        raise ValueError("config lacks model_type")
    if type(value.get("tie_word_embeddings")) is not bool:
        raise ValueError("config lacks tie_word_embeddings")
    for keys, limit in ((_HIDDEN_SIZE_KEYS, MAX_WIDTH), (("vocab_size",), MAX_VOCABULARY)):
        if not 0 < (find_integer(value, keys) or 1) <= limit:
            raise ValueError(f"{keys[0]} exceeds {limit}")
    return value


def _check_config_value(value: Json, depth: int) -> None:
    if depth == 0:
        raise ValueError("config is nested too deep")
    if isinstance(value, dict):
        unknown = _VOLATILE_KEYS.intersection(value)
        if unknown:
            raise ValueError(f"config may not have {min(unknown)}")
        for item in value.values():
            _check_config_value(item, depth - 1)
    elif isinstance(value, list):
        for item in value:
            _check_config_value(item, depth - 1)
    elif isinstance(value, int) and abs(value) > _MAX_CONFIG_INTEGER:
        raise ValueError("config has an integer beyond 2^53")
