"""The interface of backends. A new one is a module with a class `Backend`, and a line in BACKENDS.

Free of torch, so that the daemon can plan memory by the same table.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Final, Protocol

from node.engine.importing import importing
from node.util.disk_cache import FolderCache

if TYPE_CHECKING:
    import torch

    from node.engine.kv_cache import KvCache, SlotMapping
    from node.engine.loading import LoadedSpan


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows of one session in a step. `rows`: token ids i64 (rows,), or hidden states f32 (rows, hidden size)."""

    rows: "torch.Tensor"
    slots: "SlotMapping"
    position: int
    draws: int


class SpanRunner(Protocol):
    """A span in one variant, ready to run."""

    def run(
        self, slices: Sequence[Rows], kv: "KvCache", blocks: range | None = None, *, embeds: bool = False
    ) -> "Sequence[torch.Tensor]":
        """Run the rows of several sessions through some of the span's blocks (counted from its first) or all of them.

        Returns for each hidden states f32 (rows, hidden size), behind the model's last block logits f32 (draws,
        vocabulary size). `embeds`: instead of logits, the states of all rows behind the model's final norm.
        """


Step = Callable[[], "torch.Tensor"]
"""A step without arguments, over memory of its own."""

Capture = Callable[[Step], Step]
"""Records the operations of a step on a device, and returns what repeats them, on the same memory and with the same
result. It may run the step before. Raises RuntimeError where the step cannot be recorded."""


@dataclass(frozen=True, slots=True)
class BackendContext:
    """What backends build from.

    `span`: the weights, mapped from their files. `device`: what computes. `embedding`: of a first span, on the device.
    `name`: of model and blocks, for the disk cache. `capture`: records decode steps, where that pays.
    """

    span: "LoadedSpan"
    device: "torch.device"
    embedding: "torch.Tensor | None"
    name: str
    threads: int
    disk_cache: FolderCache | None
    capture: Capture | None = None

    @property
    def as_bf16(self) -> bool:
        """Whether the matrices lie on a GPU, all as they were published, in bf16; see BackendSpec.held_packing."""
        return self.device.type != "cpu" and self.span.is_bf16


class Backend(Protocol):
    """One engine over one span."""

    def __init__(self, context: BackendContext) -> None: ...

    def start_threads(self) -> None:
        """Start the threads of the steps; from the thread that runs the steps, whose priority they inherit."""

    def build(self, arithmetic: str, kv: "KvCache") -> SpanRunner:
        """Build a variant and warm it. Raises EngineError."""

    def forget(self, arithmetic: str) -> None:
        """Let go of the weights that an arithmetic shares with others, as nothing computes with them any more."""


@dataclass(frozen=True, slots=True)
class BackendSpec:
    """A backend before its module is imported, which may take seconds and memory.

    `packings`: of each arithmetic; those with the same packing share their weights. `packed_bytes`: of an element of a
    matrix in each packing. `widens`: whether fp32 holds matrices as published, where those take fewer bytes.
    """

    module: str
    packings: Mapping[str, str]
    packed_bytes: Mapping[str, float]
    cpu_only: bool = False
    widens: bool = False

    def open(self, context: BackendContext) -> Backend:
        """Import the backend, and open it on a span. Raises EngineError."""
        with importing(self.module):
            backend: type[Backend] = import_module(self.module).Backend
        return backend(context)

    def element_bytes(self, packing: str, published_bytes: int) -> float:
        """Return the bytes of an element in a packing, given those that it was published in."""
        packed_bytes = self.packed_bytes[packing]
        return min(packed_bytes, published_bytes) if self.widens and packing == "fp32" else packed_bytes

    def held_packing(self, packing: str, *, as_bf16: bool) -> str:
        """Return the packing whose weights serve another, too.

        `as_bf16`: whether all matrices were published in bf16, and lie on a GPU: there a copy would take memory, and
        what fp32 widens is what bf16 multiplies.
        """
        return "fp32" if self.widens and as_bf16 and packing == "bf16" else packing


BACKENDS: Final[Mapping[str, BackendSpec]] = {
    "fused": BackendSpec(
        "node.engine.backends.torch",
        {"fp32": "fp32", "bf16": "bf16", "int8": "int8", "w8a8": "int8"},  # of `linear.ARITHMETICS`
        {"fp32": 4.0, "bf16": 2.0, "int8": 1.0},
        widens=True,
    ),
    "onnxruntime": BackendSpec(
        "node.engine.backends.onnx",
        {"fp32": "fp32", "int8": "int8", "int4": "int4"},
        {"fp32": 4.0, "int8": 1.0 + 12 / 32, "int4": 0.5 + 12 / 64},  # with three copies of a scale, see `Quantisation`
        cpu_only=True,
    ),
}
"""By the engine of a variant; the reference, `eager`, is always there."""
