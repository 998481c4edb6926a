"""Packages of a tokenizer and a chat template, with no weights that anybody could use."""

import hashlib
from pathlib import Path

from node.models.manifest import CHAT_TEMPLATE_FILE, TOKENIZER_FILE, FileEntry, Json, Manifest
from node.models.store import Package

_FILE = FileEntry("embed.safetensors", 1, "0" * 64)


def write_package(folder: Path, definition: str | None, template: str | None = None, *, eos: int = 0) -> Package:
    """Write a package into a folder; `definition` is tokenizer.json."""
    folder.mkdir(parents=True, exist_ok=True)
    entries = []
    for name, content in ((CHAT_TEMPLATE_FILE, template), (TOKENIZER_FILE, definition)):
        if content is not None:
            data = content.encode()
            (folder / name).write_bytes(data)
            entries.append(FileEntry(name, len(data), hashlib.sha256(data).hexdigest()))
    config: dict[str, Json] = {"model_type": "llama", "tie_word_embeddings": True, "num_hidden_layers": 1}
    return Package(Manifest(config, None, (eos,), tuple(entries), _FILE, _FILE, (_FILE,)), folder)
