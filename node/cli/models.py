"""`metaswarm model …`: the model packages in this user's cache."""

import time
from itertools import groupby
from typing import TYPE_CHECKING, Any

import click

from node.cli.completion import complete_local_models, complete_sources
from node.cli.option_types import TEXT, Parsed
from node.cli.output import (
    CommandError,
    err,
    format_bytes,
    format_duration,
    json_option,
    new_table,
    out,
    print_json,
    printable,
    progress_bars,
)
from node.util.paths import expand
from protocol.identity import BlockRange, parse_block_range

if TYPE_CHECKING:
    from node.models.manifest import Manifest
    from node.models.store import ModelStore, Package

_cache_option = click.option(
    "--cache-dir", metavar="DIR", help="Folder of packages [default: METASWARM_CACHE_DIR, or the user's cache folder]."
)


@click.group()
def model() -> None:
    """Import, list, show, verify and remove model packages.

    A MODEL is the first 8 or more digits of an id, a name of the catalogue, or a name given at import.
    """


@model.command("import")
@click.argument("source", type=TEXT, metavar="SOURCE", shell_complete=complete_sources)
@click.option("--name", help="Local name of the model [default: the name of its source].")
@click.option(
    "--blocks", type=Parsed(parse_block_range), metavar="START-END", help="Keep only the files that these blocks need."
)
@click.option(
    "--manifest",
    "manifest_of",
    metavar="FILE|MODEL",
    help="The model's manifest, so that of a hub repository only the wanted bytes are read.",
)
@_cache_option
@json_option
def import_(
    source: str,
    name: str | None,
    blocks: BlockRange | None,
    manifest_of: str | None,
    cache_dir: str | None,
    as_json: bool,
) -> None:
    """Import SOURCE as a package.

    SOURCE is a name of the catalogue (see `metaswarm model list`), a folder with a Hugging Face checkpoint, a GGUF
    file (of several parts any one), or a hub repository OWNER/NAME[:QUANTISATION][@REVISION], such as
    OWNER/NAME:Q4_K_M, also as the address of its page. Weights are kept as they are, quantisation included. Of a
    repository only what is needed is read, and an interrupted import goes on when it is repeated.

    With --blocks, nothing else is kept. A model's id is over all of its files, so they are read once all the same,
    unless the manifest is known: from --manifest, or from an earlier import of the same revision.
    """
    from node.models.importer import import_model
    from node.models.parts import Selection

    store = _store(cache_dir)
    manifest = None if manifest_of is None else _manifest(store, manifest_of)
    began_s = time.monotonic()
    with progress_bars() as progress:
        wanted = Selection(blocks=blocks, manifest=manifest, note=_note)
        package = import_model(source, store, name=name, wanted=wanted, progress=progress)
    took_s = time.monotonic() - began_s
    if as_json:
        print_json({**_summary(store, package), "duration_s": round(took_s, 3)})
        return
    size = format_bytes(package.manifest.size_bytes)
    name, count = store.name_of(package.model_id), package.manifest.block_count
    here = _present_blocks(package)
    kept = "" if len(here) == count else f", {', '.join(block_ranges(here))} here"
    out().print(f"{name}: {count} blocks{kept}, {size}, in {format_duration(took_s)}", soft_wrap=True)
    out().print(f"id {package.model_id}", soft_wrap=True)


@model.command("list")
@_cache_option
@json_option
def list_(cache_dir: str | None, as_json: bool) -> None:
    """List local packages, and models of the catalogue."""
    from node.models.catalogue import CATALOGUE

    store = _store(cache_dir)
    packages, faults = store.list_all()
    here = {package.model_id for package in packages}
    offers = [entry for entry in CATALOGUE.values() if entry.model_id not in here]
    if as_json:
        catalogue = [{"name": e.name, "id": e.model_id, "title": e.title, "licence": e.licence} for e in offers]
        damaged = [
            {"id": model, "name": store.name_of(model), "size_bytes": store.size_bytes(model), "fault": str(fault)}
            for model, fault in faults.items()
        ]
        models = [_summary(store, package) for package in packages]
        print_json({"models": models, "damaged": damaged, "catalogue": catalogue})
        return
    table = new_table("name", "id", "architecture", ">blocks here", ">size")
    for package in packages:
        manifest = package.manifest
        blocks = f"{len(_present_blocks(package))} of {manifest.block_count}"
        kind, size = printable(manifest.model_type), format_bytes(manifest.size_bytes)
        table.add_row(store.name_of(package.model_id), package.model_id[:12], kind, blocks, size)
    for model_id, fault in faults.items():
        _note(str(fault))
        table.add_row(store.name_of(model_id), model_id[:12], "", "unusable", format_bytes(store.size_bytes(model_id)))
    for entry in offers:
        table.add_row(entry.name, entry.model_id[:12], "", "not imported", "")
    out().print(table)


@model.command()
@click.argument("which", metavar="MODEL", shell_complete=complete_local_models)
@_cache_option
@json_option
def show(which: str, cache_dir: str | None, as_json: bool) -> None:
    """Show the properties of a package and which of its files are local."""
    store = _store(cache_dir)
    package = store.get(store.resolve(which))
    manifest = package.manifest
    if as_json:
        files = [
            {"name": file.name, "size": file.size_bytes, "sha256": file.sha256, "present": package.has(file)}
            for file in manifest.files
        ]
        details = {"config": dict(manifest.config), "eos_token_ids": manifest.eos_token_ids, "files": files}
        print_json({**_summary(store, package), **details})
        return
    facts = {
        "name": store.name_of(package.model_id),
        "id": package.model_id,
        "architecture": printable(manifest.model_type),
        "blocks": str(manifest.block_count),
        "blocks here": ", ".join(block_ranges(_present_blocks(package))) or "none",
        "hidden size": str(manifest.hidden_size or "unknown"),
        "vocabulary": str(manifest.vocabulary_size or "unknown"),
        "longest text": f"{manifest.max_positions or 'unknown'} tokens",
        "embeddings": "tied" if manifest.tied else "not tied",
        "weights": _weights(manifest),
        "may be cut": _cuts(manifest),
        "tokenizer": ", ".join(file.name for file in manifest.tokenizer_files) or "none",
        "size": format_bytes(manifest.size_bytes),
        "folder": str(package.path),
    }
    for fact, value in facts.items():
        out().print(f"{fact:<14}{value}", soft_wrap=True)


@model.command()
@click.argument("which", metavar="MODEL", shell_complete=complete_local_models)
@_cache_option
@json_option
def verify(which: str, cache_dir: str | None, as_json: bool) -> None:
    """Check the hashes of a package's local files, all of them: a start checks only new and changed ones.

    Missing files are not an error: a peer needs only those of the blocks that it serves.
    """
    store = _store(cache_dir)
    model_id = store.resolve(which)
    with progress_bars() as progress:
        found = store.verify(model_id, progress=progress)
    if as_json:
        files = {"checked": len(found.checked), "missing": found.missing, "corrupt": found.corrupt}
        print_json({"id": model_id, "ok": not found.corrupt, **files})
    if found.corrupt:
        cure = f"`metaswarm model remove {model_id[:12]}`, then import it again"
        raise CommandError(f"damaged: {', '.join(found.corrupt)}; {cure}")
    if not as_json:
        missing = f", {len(found.missing)} missing" if found.missing else ""
        out().print(f"{store.name_of(model_id)}: {len(found.checked)} files are valid{missing}")


@model.command()
@click.argument("which", metavar="MODEL", shell_complete=complete_local_models)
@click.option("--force", is_flag=True, help="Also while a node uses it, which fails once it reads a file again.")
@_cache_option
@json_option
def remove(which: str, force: bool, cache_dir: str | None, as_json: bool) -> None:
    """Delete a package, and what was built of it, unless a node on this machine serves from it or fetches its files."""
    from node.models.store import ModelInUseError

    store = _store(cache_dir)
    model_id = store.resolve(which)
    name = store.name_of(model_id)
    try:
        freed_bytes = store.remove(model_id, force=force)
    except ModelInUseError:
        raise CommandError(
            f"a node on this machine serves {name} from this package, or fetches its files: stop it first, or --force"
        ) from None
    if as_json:
        print_json({"id": model_id, "removed": True, "freed_bytes": freed_bytes})
    else:
        out().print(f"removed {name}: {format_bytes(freed_bytes)} freed")


def _store(cache_dir: str | None) -> "ModelStore":
    from node.cli.options import read_cache_dir
    from node.models.store import ModelStore

    return ModelStore(read_cache_dir(cache_dir))


def _note(line: str) -> None:
    """Print a line beside progress bars."""
    err().print(printable(line), soft_wrap=True, markup=False, highlight=False)


def _manifest(store: "ModelStore", text: str) -> "Manifest":
    """Return the manifest in a file, or of a model in the cache."""
    from node.models.manifest import parse_manifest

    path = expand(text)
    if path.is_file():
        return parse_manifest(path.read_bytes())
    return store.get(store.resolve(text)).manifest


def _summary(store: "ModelStore", package: "Package") -> dict[str, Any]:
    manifest = package.manifest
    return {
        "id": package.model_id,
        "name": store.name_of(package.model_id),
        "architecture": manifest.model_type,
        "blocks": manifest.block_count,
        "format": manifest.format,
        "granularity": manifest.granularity,
        "blocks_present": block_ranges(_present_blocks(package)),
        "complete": not package.missing(),
        "size_bytes": manifest.size_bytes,
        "path": str(package.path),
    }


def _weights(manifest: "Manifest") -> str:
    kind = manifest.config.get("weight_type", manifest.config.get("dtype"))
    return f"{manifest.format}, mostly {printable(kind)}" if isinstance(kind, str) else manifest.format


def _cuts(manifest: "Manifest") -> str:
    if manifest.cuts.unit_count == 1:
        return "nowhere"
    return "anywhere" if manifest.granularity == 1 else f"every {manifest.granularity} blocks"


def _present_blocks(package: "Package") -> list[int]:
    return [number for number, file in enumerate(package.manifest.blocks) if package.has(file)]


def block_ranges(blocks: list[int]) -> list[str]:
    """Return sorted block numbers as ranges, end exclusive: [0, 1, 2, 7] is 0-3 and 7-8."""
    runs = (list(run) for _, run in groupby(enumerate(blocks), key=lambda item: item[1] - item[0]))
    return [f"{run[0][1]}-{run[-1][1] + 1}" for run in runs]
