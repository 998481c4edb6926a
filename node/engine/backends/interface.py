"""The interface of backends. A new one is a module with a class `Backend`, and a line in BACKENDS."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Final, Protocol

import torch

from node.engine.backends.linear import ARITHMETICS
from node.engine.kv_cache import KvCache, SlotMapping
from node.engine.loading import LoadedSpan
from node.util.disk_cache import FolderCache


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows of one session in a step. `rows`: token ids i64 (rows,), or hidden states f32 (rows, hidden size)."""

    rows: torch.Tensor
    slots: SlotMapping
    position: int
    draws: int


class SpanRunner(Protocol):
    """A span in one variant, ready to run."""

    def run(self, slices: Sequence[Rows], kv: KvCache, blocks: range | None = None) -> Sequence[torch.Tensor]:
        """Run the rows of several sessions through some of the span's blocks (counted from its first) or all of them.

        Returns for each hidden states f32 (rows, hidden size), behind the model's last block logits f32 (draws,
        vocabulary size).
        """


@dataclass(frozen=True, slots=True)
class BackendContext:
    """What backends build from. `name`: of model and blocks, for the disk cache."""

    span: LoadedSpan
    name: str
    threads: int
    disk_cache: FolderCache | None


class Backend(Protocol):
    """One engine over one span."""

    def __init__(self, context: BackendContext) -> None: ...

    def start_threads(self) -> None:
        """Start the threads of the steps; from the thread that runs the steps, whose priority they inherit."""

    def build(self, arithmetic: str, kv: KvCache) -> SpanRunner:
        """Build a variant and warm it. Raises EngineError."""


@dataclass(frozen=True, slots=True)
class BackendSpec:
    """A backend before its module is imported, which may take seconds and memory.

    `packings`: of each arithmetic; those with the same packing share their weights. `packed_bytes`: of an element of a
    matrix in each packing.
    """

    module: str
    packings: Mapping[str, str]
    packed_bytes: Mapping[str, float]
    cpu_only: bool = False

    def open(self, context: BackendContext) -> Backend:
        """Import the backend, and open it on a span."""
        backend: type[Backend] = import_module(self.module).Backend
        return backend(context)


BACKENDS: Final[Mapping[str, BackendSpec]] = {
    "fused": BackendSpec(
        "node.engine.backends.torch",
        {arithmetic: packing for arithmetic, (packing, _) in ARITHMETICS.items()},
        {"fp32": 4.0, "bf16": 2.0, "int8": 1.0},
    ),
    "onnxruntime": BackendSpec(
        "node.engine.backends.onnx",
        {"fp32": "fp32", "int8": "int8"},
        {"fp32": 4.0, "int8": 1.0 + 4 / 32},  # with a scale for each 32 elements
        cpu_only=True,
    ),
}
"""By the engine of a variant; the reference, `eager`, is always there."""
