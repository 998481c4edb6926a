"""Which models the commits of hub repositories and local files gave, in sources.json of the cache folder.

So further blocks of a model are read from there without hashing all the others again, also by a node that serves it,
and `metaswarm run SOURCE` need not import it again. Local files are named by path, size and modification time.
"""

import hashlib
import json
import re
from glob import escape
from pathlib import Path
from typing import Final

from node.models.files import disk_errors, lock_file, write_atomically
from protocol.identity import ModelId, parse_model_id

_FILE: Final = "sources.json"
_PART: Final = re.compile(r"(.+-)\d{5}(-of-\d{5}\.gguf)", re.IGNORECASE)


def record_source(cache_dir: Path, source: str, model: ModelId) -> None:
    """Remember which model importing a source gives. It must name bytes that never change. Raises ModelError."""
    with disk_errors(f"cannot write {cache_dir / _FILE}"), lock_file(cache_dir / ".lock"):
        path, is_local, _ = source.rpartition("#")
        kept = {
            known: given
            for known, given in recorded_sources(cache_dir).items()
            if known != source and not (is_local and known.startswith(f"{path}#"))
        }
        write_atomically(cache_dir / _FILE, json.dumps({**kept, source: model}, indent=2).encode() + b"\n")


def source_of_files(path: Path) -> str | None:
    """Return the name of what is in a folder, or in a file and those that its model is split into.

    It is another one after any of them was written to. None where they cannot be read.
    """
    try:
        path = path.resolve()
        part = _PART.fullmatch(path.name)
        files = [path] if part is None else path.parent.glob(f"{escape(part[1])}*{part[2]}")
        stamps = [
            (file.name, file.stat().st_size, file.stat().st_mtime_ns)
            for file in sorted(path.iterdir() if path.is_dir() else files)
        ]
    except OSError:
        return None
    return f"{path}#{hashlib.sha256(json.dumps(stamps).encode()).hexdigest()[:32]}"


def model_of_source(cache_dir: Path, source: str) -> ModelId | None:
    """Return which model importing a source gave, if that is known."""
    return recorded_sources(cache_dir).get(source)


def source_of_model(cache_dir: Path, model: ModelId) -> str | None:
    """Return the commit of a hub repository that a model was imported from, if that is known."""
    found = (source for source, given in recorded_sources(cache_dir).items() if given == model)
    return next((source for source in found if not source.startswith("/")), None)


def recorded_sources(cache_dir: Path) -> dict[str, ModelId]:
    """Return all sources with their models, the last imported last."""
    try:
        models = json.loads((cache_dir / _FILE).read_bytes())
        return {str(source): parse_model_id(str(model)) for source, model in models.items()}
    except (OSError, ValueError, AttributeError):
        return {}  # nothing but time is lost
