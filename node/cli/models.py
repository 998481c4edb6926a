"""`metaswarm model …`: the model packages in this user's cache."""

import time
from itertools import groupby
from typing import TYPE_CHECKING, Any

import click

from node.cli.output import (
    CommandError,
    format_bytes,
    format_duration,
    json_option,
    new_table,
    out,
    print_json,
    printable,
    progress_bars,
)

if TYPE_CHECKING:
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
@click.argument("source")
@click.option("--name", help="Local name of the model [default: the name of its source].")
@_cache_option
@json_option
def import_(source: str, name: str | None, cache_dir: str | None, as_json: bool) -> None:
    """Import SOURCE as a package.

    SOURCE is a name of the catalogue (see `metaswarm model list`), a folder with a Hugging Face checkpoint, a GGUF
    file, or a hub repository OWNER/NAME[@REVISION].
    """
    from node.models.importer import import_model

    store = _store(cache_dir)
    began_s = time.monotonic()
    with progress_bars() as progress:
        package = import_model(source, store, name=name, progress=progress)
    took_s = time.monotonic() - began_s
    if as_json:
        print_json({**_summary(store, package), "duration_s": round(took_s, 3)})
        return
    size = format_bytes(package.manifest.size_bytes)
    name, blocks = store.name_of(package.model_id), package.manifest.block_count
    out().print(f"{name}: {blocks} blocks, {size}, in {format_duration(took_s)}", soft_wrap=True)
    out().print(f"id {package.model_id}", soft_wrap=True)


@model.command("list")
@_cache_option
@json_option
def list_(cache_dir: str | None, as_json: bool) -> None:
    """List local packages, and models of the catalogue."""
    from node.models.catalogue import CATALOGUE

    store = _store(cache_dir)
    packages = store.list()
    here = {package.model_id for package in packages}
    offers = [entry for entry in CATALOGUE.values() if entry.model_id not in here]
    if as_json:
        catalogue = [{"name": e.name, "id": e.model_id, "title": e.title, "licence": e.licence} for e in offers]
        print_json({"models": [_summary(store, package) for package in packages], "catalogue": catalogue})
        return
    table = new_table("name", "id", "architecture", ">blocks here", ">size")
    for package in packages:
        manifest = package.manifest
        blocks = f"{len(_present_blocks(package))} of {manifest.block_count}"
        kind, size = printable(manifest.model_type), format_bytes(manifest.size_bytes)
        table.add_row(store.name_of(package.model_id), package.model_id[:12], kind, blocks, size)
    for entry in offers:
        table.add_row(entry.name, entry.model_id[:12], "", "not imported", "")
    out().print(table)


@model.command()
@click.argument("which", metavar="MODEL")
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
        "blocks here": ", ".join(_ranges(_present_blocks(package))) or "none",
        "hidden size": str(manifest.hidden_size or "unknown"),
        "vocabulary": str(manifest.vocabulary_size or "unknown"),
        "longest text": f"{manifest.max_positions or 'unknown'} tokens",
        "embeddings": "tied" if manifest.tied else "not tied",
        "tokenizer": ", ".join(file.name for file in manifest.tokenizer_files) or "none",
        "size": format_bytes(manifest.size_bytes),
        "folder": str(package.path),
    }
    for fact, value in facts.items():
        out().print(f"{fact:<14}{value}", soft_wrap=True)


@model.command()
@click.argument("which", metavar="MODEL")
@_cache_option
@json_option
def verify(which: str, cache_dir: str | None, as_json: bool) -> None:
    """Check the hashes of a package's local files.

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
@click.argument("which", metavar="MODEL")
@_cache_option
@json_option
def remove(which: str, cache_dir: str | None, as_json: bool) -> None:
    """Delete a package. Nodes that serve from it now are not disturbed."""
    store = _store(cache_dir)
    model_id = store.resolve(which)
    name = store.name_of(model_id)
    store.remove(model_id)
    if as_json:
        print_json({"id": model_id, "removed": True})
    else:
        out().print(f"removed {name}")


def _store(cache_dir: str | None) -> "ModelStore":
    from node.cli.options import read_config
    from node.models.store import ModelStore

    return ModelStore(read_config(*([] if cache_dir is None else [f"--cache-dir={cache_dir}"])).cache_dir)


def _summary(store: "ModelStore", package: "Package") -> dict[str, Any]:
    manifest = package.manifest
    return {
        "id": package.model_id,
        "name": store.name_of(package.model_id),
        "architecture": manifest.model_type,
        "blocks": manifest.block_count,
        "blocks_present": _ranges(_present_blocks(package)),
        "complete": not package.missing(),
        "size_bytes": manifest.size_bytes,
        "path": str(package.path),
    }


def _present_blocks(package: "Package") -> list[int]:
    return [number for number, file in enumerate(package.manifest.blocks) if package.has(file)]


def _ranges(blocks: list[int]) -> list[str]:
    """Return sorted block numbers as ranges, end exclusive: [0, 1, 2, 7] is 0-3 and 7-8."""
    runs = (list(run) for _, run in groupby(enumerate(blocks), key=lambda item: item[1] - item[0]))
    return [f"{run[0][1]}-{run[-1][1] + 1}" for run in runs]
