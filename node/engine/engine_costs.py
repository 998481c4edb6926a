"""What the engine that serves a package holds: the part of the memory plan that depends on engines and variants."""

from typing import Final

from node.engine.backends.interface import BACKENDS
from node.engine.memory_plan import GGUF_COSTS, EngineCosts
from node.models.layout import GGUF
from node.models.manifest import Manifest

_F32_BYTES: Final = 4
_STORED_BYTES: Final = {"float32": 4, "bfloat16": 2, "float16": 2}


def engine_costs(manifest: Manifest) -> EngineCosts:
    """Return what the engine that serves a package holds at least: one exact variant, the smallest."""
    if manifest.format == GGUF:
        return GGUF_COSTS
    stored = stored_element_bytes(manifest)
    return EngineCosts(BACKENDS["fused"].element_bytes("fp32", stored) / stored, float(_F32_BYTES))


def stored_element_bytes(manifest: Manifest) -> int:
    """Return the bytes of a weight in a safetensors package's files.

    By the size of the embedding, which is a matrix of known shape, as configs state the type of another checkpoint or
    none; by the config where that says nothing.
    """
    rows, width = manifest.vocabulary_size, manifest.hidden_size
    if rows and width:
        return min((4, 2, 1), key=lambda size: abs(manifest.embed.size_bytes - size * rows * width))
    return _STORED_BYTES.get(str(manifest.config.get("dtype")), 2)
