"""A Hugging Face checkpoint: config, tokenizer and safetensors files, as which bytes make which file of a package.

Its small files are in a folder; its weights are there, too, or on a server.
"""

import hashlib
import json
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Final

from node.models.byte_source import ByteSource, LocalFile
from node.models.errors import ModelError
from node.models.files import disk_errors, write_atomically
from node.models.layout import BY_NAME, OuterNames, arrange, block_file, input_matrix, output_matrix, part_file
from node.models.manifest import (
    CHAT_TEMPLATE_FILE,
    MAX_TOKENIZER_BYTES,
    TOKENIZER_CONFIG_FILE,
    TOKENIZER_FILE,
    FileEntry,
    Json,
    block_count_of,
    normalise_config,
)
from node.models.safetensors_file import TensorSource, merge_headers, read_header, same_bytes
from protocol.canonical import canonical_json
from protocol.limits import MAX_BLOCKS

CONFIG_FILE: Final = "config.json"
WEIGHTS_INDEX: Final = "model.safetensors.index.json"

OTHER_TOKENIZERS: Final = (
    "*.tiktoken", "encoder.json", "merges.txt", "sentencepiece.bpe.model", "spiece.model", "tekken.json",
    "tiktoken.model", "tokenizer.model*", "vocab.*",
)  # fmt: skip
"""Tokenizers in unsupported forms: only tokenizer.json is read here."""

_EMBED_FILE: Final = part_file("embed")
_HEAD_FILE: Final = part_file("head")
_PICKLES: Final = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})(\.safetensors)")

# Config keys of quantised checkpoints, and who writes them.
_QUANTISED: Final = {"quantization_config": "", "quantization": ", as MLX writes it", "compression_config": ""}
_UNQUANTISED: Final = "import the original in full precision, or a GGUF file"
_SCALE = re.compile(
    r".+[._](?:weight_scale(?:_inv|_2)?|input_scale|scale_inv|scales|qweight|qzeros|g_idx|absmax|quant_map|quant_state"
    r"\..+|weight_packed|weight_zero_point|SCB)"
)
_WHOLE_NUMBERS: Final = frozenset({"BOOL", "U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64"})
_MAX_JSON_BYTES: Final = 64 << 20


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A parsed Hugging Face folder: the model's config, and which bytes make which file of its package.

    `config` states whether the embeddings are tied, as the tensors show; `stated_config` what the folder states.
    """

    config: dict[str, Json]
    stated_config: dict[str, Json]
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    files: Mapping[str, Mapping[str, TensorSource]]

    @property
    def size_bytes(self) -> int:
        """Bytes of all tensors that will be copied."""
        return sum(tensor.size_bytes for tensors in self.files.values() for tensor in tensors.values())

    @property
    def shapes(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Dtype and shape of all tensors that will be copied."""
        return {name: (it.dtype, it.shape) for tensors in self.files.values() for name, it in tensors.items()}


def read_checkpoint(
    folder: Path, names: OuterNames = BY_NAME, weights: Mapping[str, ByteSource] | None = None, *, name: str = ""
) -> Checkpoint:
    """Parse a Hugging Face folder: its JSON files, and the headers of its weights. Raises ModelError.

    `names`: the modules around the architecture's blocks, where they have been traced. `weights`: the safetensors files
    by name where they are elsewhere, and `name` of all for messages.
    """
    config = read_config(folder, name=name)
    where = name or str(folder)
    block_count = block_count_of(config) or 0
    tensors: dict[str, TensorSource] = {}
    with disk_errors(f"cannot read {where}"):
        files = _local_weights(folder) if weights is None else weights
        for file in choose_weights(folder, files, where):
            try:
                tensors = merge_headers((tensors, read_header(files[file])))
            except ValueError as error:
                raise ModelError(f"{where}: {file}: {error}") from None
        _refuse_quantised(where, tensors)
        try:
            tied = _is_tied(config, tensors, names)
            layout = arrange(tensors, block_count, tied=tied, names=names)
        except ValueError as error:
            raise ModelError(f"{where} is incomplete: {error}") from None
    parts = {_EMBED_FILE: layout.embed, _HEAD_FILE: layout.head}
    parts |= {block_file(block): block_tensors for block, block_tensors in enumerate(layout.blocks)}
    generation = _read_json(folder / "generation_config.json", optional=True)
    eos = _token_ids(generation.get("eos_token_id")) or _token_ids(_of_decoder(config, "eos_token_id"))
    bos = _token_ids(generation.get("bos_token_id")) or _token_ids(_of_decoder(config, "bos_token_id"))
    return Checkpoint(
        config={**config, "tie_word_embeddings": tied},
        stated_config=config if output_matrix(tensors, names) is None else {**config, "tie_word_embeddings": tied},
        bos_token_id=bos[0] if bos else None,
        eos_token_ids=eos,
        files={file: {name: tensors[name] for name in part} for file, part in parts.items()},
    )


def read_config(folder: Path, *, name: str = "") -> dict[str, Json]:
    """Return the config of a Hugging Face folder; raise ModelError for unsupported models."""
    where = name or str(folder)
    config = normalise_config(_read_json(folder / CONFIG_FILE, where=where))
    for key, kind in _QUANTISED.items():
        if config.get(key) is not None:
            raise ModelError(f"{where} is a quantised checkpoint ({key} in its config.json{kind}): {_UNQUANTISED}")
    if not isinstance(config.get("model_type"), str):
        raise ModelError(f"{where}/{CONFIG_FILE} names no model_type: not a model of transformers")
    block_count = block_count_of(config)
    if block_count is None or not 0 < block_count <= MAX_BLOCKS:
        raise ModelError(f"{where}/{CONFIG_FILE} does not say how many layers the model has, from 1 to {MAX_BLOCKS}")
    try:
        canonical_json(config)
    except ValueError as error:
        raise ModelError(f"{where} cannot become a package: {error}") from None
    return config


def _refuse_quantised(where: str, tensors: Mapping[str, TensorSource]) -> None:
    """Raise ModelError for quantised weights that the config does not describe."""
    for name, tensor in tensors.items():
        is_packed = tensor.dtype.startswith("F8_") or (tensor.dtype in _WHOLE_NUMBERS and name.endswith(".weight"))
        if is_packed or _SCALE.fullmatch(name):
            raise ModelError(
                f"{where} is a quantised checkpoint (tensor {name[:100]!r} of type {tensor.dtype}), and its "
                f"config.json does not say how (quantization_config): {_UNQUANTISED}"
            )


def _is_tied(config: Mapping[str, Json], tensors: Mapping[str, TensorSource], names: OuterNames) -> bool:
    """Return whether the embeddings are tied; raise ValueError where the output matrix is missing.

    Configs often leave it to their class's default. Then the tensors decide, as in transformers: an output matrix that
    is stored and differs from the embedding is used.
    """
    output, embedding = output_matrix(tensors, names), input_matrix(tensors, names)
    if output is None:
        if _of_decoder(config, "tie_word_embeddings") is False:
            raise ValueError("it has no output matrix (lm_head), and its embeddings are not tied")
        return True
    if _of_decoder(config, "tie_word_embeddings") is False or embedding is None:
        return False
    return same_bytes(tensors[output], tensors[embedding])


def _of_decoder(config: Mapping[str, Json], key: str) -> Json:
    decoder = config.get("text_config")
    return config[key] if key in config else decoder.get(key) if isinstance(decoder, dict) else None


def _local_weights(folder: Path) -> dict[str, ByteSource]:
    return {path.name: LocalFile.of(path) for path in sorted(folder.iterdir()) if path.is_file()}


def choose_weights(folder: Path, files: Collection[str], where: str) -> list[str]:
    """Return which of a checkpoint's files are its weights, all in safetensors format; raise ModelError.

    `folder` has its index, if any.
    """
    if (folder / WEIGHTS_INDEX).exists():
        weight_map = _read_json(folder / WEIGHTS_INDEX).get("weight_map")
        names = sorted({str(name) for name in weight_map.values()}) if isinstance(weight_map, dict) else []
        if outside := [name for name in names if name != Path(name).name or name == ".." or "\\" in name]:
            raise ModelError(
                f"{where}/{WEIGHTS_INDEX} names {outside[0][:200]!r}, which is not a file of that folder: refused"
            )
        missing = [name for name in names if name not in files]
        if missing or not names:
            raise ModelError(f"{where} is incomplete: {WEIGHTS_INDEX} names {missing[0] if missing else 'no files'}")
        return names
    safetensors = sorted(name for name in files if fnmatch(name, "*.safetensors"))
    names = [name for name in safetensors if name.startswith("model")] or safetensors
    if names:
        _check_shards(where, names)
        return names
    if any(fnmatch(name, pattern) for name in files for pattern in _PICKLES):
        raise ModelError(
            f"{where} has its weights only as pickles, which can run code and are never loaded here: convert them to "
            "safetensors first"
        )
    raise ModelError(f"{where} has no *.safetensors files")


def _check_shards(where: str, names: list[str]) -> None:
    for shard in filter(None, map(_SHARD.fullmatch, names)):
        for number in range(1, min(int(shard[3]), MAX_BLOCKS * 8) + 1):
            name = f"{shard[1]}-{number:05d}-of-{shard[3]}{shard[4]}"
            if name not in names:
                raise ModelError(f"{where} is incomplete: it has {shard[0]}, and lacks {name}")


def other_tokenizer(names: Iterable[str]) -> str | None:
    """Return the first file with a tokenizer in an unsupported form."""
    return min((name for name in names if any(fnmatch(name, pattern) for pattern in OTHER_TOKENIZERS)), default=None)


def no_tokenizer_json(where: object, other: str) -> str:
    """Return the error for a checkpoint whose tokenizer is in an unsupported form."""
    return (
        f"{where} has its tokenizer only as {other}, and no {TOKENIZER_FILE}: convert it (load it with transformers' "
        "AutoTokenizer and save it), put the file beside it, and import the folder"
    )


def write_tokenizer(folder: Path, target: Path) -> tuple[FileEntry, ...]:
    """Copy the tokenizer, and write its config and chat template in their canonical form."""
    config = _read_json(folder / TOKENIZER_CONFIG_FILE, optional=True)
    if not (folder / TOKENIZER_FILE).exists():
        named = config.get("tokenizer_class")
        other = other_tokenizer(path.name for path in folder.iterdir())
        if other is None and isinstance(named, str):
            other = f"the class {named[:80]}"
        if other is not None:
            raise ModelError(no_tokenizer_json(folder, other))
        return ()  # a model that is only ever given token ids
    special = _read_json(folder / "special_tokens_map.json", optional=True)
    template = _chat_template(folder, config.pop("chat_template", None))
    contents = {
        TOKENIZER_FILE: (folder / TOKENIZER_FILE).read_bytes(),
        TOKENIZER_CONFIG_FILE: canonical_json(normalise_config({**special, **config})),
    }
    if template:
        contents[CHAT_TEMPLATE_FILE] = template.encode()
    entries = []
    for name, data in sorted(contents.items()):
        if len(data) > MAX_TOKENIZER_BYTES[name]:
            raise ModelError(f"{folder / name} is larger than {MAX_TOKENIZER_BYTES[name] >> 20} MiB")
        write_atomically(target / name, data)
        entries.append(FileEntry(name, len(data), hashlib.sha256(data).hexdigest()))
    return tuple(entries)


def _chat_template(folder: Path, in_config: Json) -> str | None:
    """Return the chat template from a file of its own or from the tokenizer's config; the default one of several."""
    if (folder / CHAT_TEMPLATE_FILE).exists():
        return (folder / CHAT_TEMPLATE_FILE).read_text(encoding="utf-8")
    template = _read_json(folder / "chat_template.json", optional=True).get("chat_template", in_config)
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _token_ids(value: Json) -> tuple[int, ...]:
    values = value if isinstance(value, list) else [value]
    return tuple(sorted({token for token in values if type(token) is int and token >= 0}))


def _read_json(path: Path, *, optional: bool = False, where: str = "") -> dict[str, Json]:
    try:
        if optional and not path.exists():
            return {}
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise ModelError(f"{path} is too large")
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ModelError(f"{where or path.parent} has no {path.name}: not the folder of a Hugging Face model") from None
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path} is not a JSON object")
    return value
