"""Which models the commits of hub repositories gave, in sources.json of the cache folder.

So further blocks of a model are read from there without hashing all the others again, also by a node that serves it.
"""

import json
from pathlib import Path
from typing import Final

from node.models.files import disk_errors, lock_file, write_atomically
from protocol.identity import ModelId, parse_model_id

_FILE: Final = "sources.json"


def record_source(cache_dir: Path, source: str, model: ModelId) -> None:
    """Remember which model importing a source gives. It must name bytes that never change. Raises ModelError."""
    with disk_errors(f"cannot write {cache_dir / _FILE}"), lock_file(cache_dir / ".lock"):
        models = {**_read(cache_dir), source: model}
        write_atomically(cache_dir / _FILE, json.dumps(models, indent=2, sort_keys=True).encode() + b"\n")


def model_of_source(cache_dir: Path, source: str) -> ModelId | None:
    """Return which model importing a source gave, if that is known."""
    return _read(cache_dir).get(source)


def source_of_model(cache_dir: Path, model: ModelId) -> str | None:
    """Return what a model was imported from, if that is known."""
    return next((source for source, given in _read(cache_dir).items() if given == model), None)


def _read(cache_dir: Path) -> dict[str, ModelId]:
    try:
        models = json.loads((cache_dir / _FILE).read_bytes())
        return {str(source): parse_model_id(str(model)) for source, model in models.items()}
    except (OSError, ValueError, AttributeError):
        return {}  # nothing but time is lost
