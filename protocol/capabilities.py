"""Capability records: a peer's hardware, its measured throughput, and its observed links.

All of this is the peer's own report, signed and bounded. It serves for display and prediction; decisions rest on what
was measured in common work.
"""

import enum
import re
from dataclasses import dataclass
from itertools import dropwhile, takewhile
from typing import Annotated, ClassVar, Final, NewType

from protocol.announcements import DHT_NAMESPACE, DhtRecord
from protocol.errors import RemoteProtocolError
from protocol.figures import (
    MAX_MEMORY_BYTES,
    MAX_ROUND_TRIP_S,
    MIN_FIGURE,
    USUAL_PRICE,
    BytesPerSecond,
    Cores,
    MemoryBytes,
    OperationsPerSecond,
    Price,
)
from protocol.identity import PeerId
from protocol.limits import MAX_HARDWARE_BYTES, MAX_TEXT_BYTES
from protocol.schema import Count, Nullable, Range, name, text
from protocol.stage_facts import DeviceKind, StageFacts

CAPABILITY_TOPIC: Final = "metaswarm/1/capabilities"
"""The gossip topic of capability records."""

CAPABILITY_KIND: Final = "cap"
"""The second part of the DHT key of a capability record."""

FORMAT_VERSION: Final = 1

MAX_INSTRUCTION_SETS: Final = 32
MAX_ACCELERATORS: Final = 64
MAX_NEIGHBOURS: Final = 16
MAX_WORD_BYTES: Final = 64
"""A version, the name of an instruction set or of an architecture."""

HardwareClass = NewType("HardwareClass", str)
"""A short canonical text shared by similar hardware, see `hardware_class`."""

Word = Annotated[str, name(MAX_WORD_BYTES)]
Title = Annotated[str, name(MAX_TEXT_BYTES)]


class AcceleratorKind(enum.StrEnum):
    """The programming interface of an accelerator."""

    CUDA = "cuda"
    ROCM = "rocm"
    MPS = "mps"


@dataclass(frozen=True, slots=True, kw_only=True)
class Throughput:
    """Measured sustained throughput of a device; None: not measured, or not supported."""

    memory_read_bytes_per_s: BytesPerSecond | None = None
    fp32_flop_per_s: OperationsPerSecond | None = None
    """Matrix products; a multiplication and an addition are two operations."""
    bf16_flop_per_s: OperationsPerSecond | None = None
    int8_op_per_s: OperationsPerSecond | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Processor:
    """The CPU, as far as the node may use it."""

    architecture: Word
    """As the operating system reports it: `x86_64`, `aarch64`, `arm64`."""
    model: Title
    physical_cores: Cores
    logical_cores: Cores
    instruction_sets: Annotated[tuple[Word, ...], Count(MAX_INSTRUCTION_SETS)] = ()
    """Those that matter to matrix products, by their Linux names, sorted."""
    throughput: Throughput = Throughput()
    threads: Cores | None = None
    """Of the engines, where the owner limits them; the throughput was measured with as many."""

    def check(self) -> None:
        """Raise RemoteProtocolError for more physical than logical cores, and for unsorted instruction sets."""
        if self.physical_cores > self.logical_cores:
            raise RemoteProtocolError(
                f"processor physical_cores is {self.physical_cores}: expected at most {self.logical_cores}"
            )
        if list(self.instruction_sets) != sorted(set(self.instruction_sets)):
            raise RemoteProtocolError("processor instruction_sets are not sorted, or one appears twice")


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Main memory, as far as the node may use it."""

    total_bytes: MemoryBytes
    available_bytes: Annotated[int, Range(0, MAX_MEMORY_BYTES)]

    def check(self) -> None:
        """Raise RemoteProtocolError for more available memory than there is."""
        if self.available_bytes > self.total_bytes:
            raise RemoteProtocolError(
                f"memory available_bytes is {self.available_bytes}: expected at most {self.total_bytes}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Accelerator:
    """A GPU."""

    kind: AcceleratorKind
    name: Title
    memory_bytes: MemoryBytes
    compute_capability: Annotated[str, text(MAX_WORD_BYTES)] = ""
    """`9.0` for CUDA, `gfx942` for ROCm; empty where undefined."""
    throughput: Throughput = Throughput()


@dataclass(frozen=True, slots=True, kw_only=True)
class Software:
    """Versions; None: not installed."""

    metaswarm: Word
    python: Word
    torch: Word | None = None
    onnxruntime: Word | None = None
    transformers: Word | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Neighbour:
    """A peer with recent traffic; None: too little of it to measure."""

    peer: PeerId
    round_trip_s: Annotated[float, Range(MIN_FIGURE, MAX_ROUND_TRIP_S)] | None = None
    """Median."""
    upload_bytes_per_s: BytesPerSecond | None = None
    download_bytes_per_s: BytesPerSecond | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Links:
    """The peer's bandwidth as seen in its traffic: the best sustained rates to any neighbour, and those to each."""

    upload_bytes_per_s: BytesPerSecond | None = None
    download_bytes_per_s: BytesPerSecond | None = None
    neighbours: Annotated[tuple[Neighbour, ...], Count(MAX_NEIGHBOURS)] = ()

    def check(self) -> None:
        """Raise RemoteProtocolError for a neighbour that appears twice."""
        if len({neighbour.peer for neighbour in self.neighbours}) != len(self.neighbours):
            raise RemoteProtocolError("links neighbours: a peer appears twice")


@dataclass(frozen=True, slots=True, kw_only=True)
class Capabilities:
    """The hardware and software of a peer."""

    processor: Processor
    memory: Memory
    software: Software
    accelerators: Annotated[tuple[Accelerator, ...], Count(MAX_ACCELERATORS)] = ()
    disk_read_bytes_per_s: BytesPerSecond | None = None
    """Of the disk of models; no longer measured, as nothing depends on it, but accepted from peers of before."""
    links: Links = Links()
    price: Price | None = None
    """Of a second of computing; None: 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CapabilityRecord(DhtRecord):
    """A peer's report of its capabilities; None withdraws it, when the peer leaves."""

    kind: ClassVar[str] = "capability"

    version: Annotated[int, Range(FORMAT_VERSION, FORMAT_VERSION)] = FORMAT_VERSION
    capabilities: Nullable[Capabilities]

    @property
    def key(self) -> str:
        """The DHT key under which it is stored."""
        return capability_key(self.peer)

    def check(self) -> None:
        """Raise RemoteProtocolError for a peer that lists itself as a neighbour."""
        if self.capabilities and any(each.peer == self.peer for each in self.capabilities.links.neighbours):
            raise RemoteProtocolError("capability record: a peer is its own neighbour")


def capability_key(peer: PeerId) -> str:
    """Return the DHT key of a peer's capability record."""
    return f"/{DHT_NAMESPACE}/{CAPABILITY_KIND}/{peer}"


def fastest_bytes_per_s(capabilities: Capabilities) -> float | None:
    """Return the reported read throughput of the peer's fastest memory; None where none was measured."""
    sustained = [capabilities.processor.throughput, *(each.throughput for each in capabilities.accelerators)]
    return max((rate for each in sustained if (rate := each.memory_read_bytes_per_s)), default=None)


def main_accelerator(capabilities: Capabilities) -> Accelerator | None:
    """Return the accelerator with the most memory; None where there is none."""
    return max(capabilities.accelerators, key=lambda device: (device.memory_bytes, device.name), default=None)


def hardware_class(capabilities: Capabilities) -> HardwareClass:
    """Return the short text shared by similar hardware.

    With an accelerator, the one with the most memory: kind, name, number of them, memory of each, as in
    `cuda/nvidia-h200/1x/144g`. Without: the processor's make, its best instruction set for matrix products, physical
    cores, memory, as in `cpu/amd-epyc/avx512-bf16/2c/24g`, and the threads of the engines where they are not as many as
    the cores, as in `cpu/amd-epyc/avx512-bf16/16c/96g/1t`. Memory is rounded to 4, 5, 6 or 7 times a power of two, so
    that the share reserved by the system makes no difference. Names are cut to what the wire takes.
    """
    if best := main_accelerator(capabilities):
        count = sum((device.kind, device.name) == (best.kind, best.name) for device in capabilities.accelerators)
        kind, title = best.kind.value, _slug(best.name)
        rest = [f"{count}x", _rounded_gigabytes(best.memory_bytes)]
    else:
        processor = capabilities.processor
        kind, title, cores = "cpu", _make(processor.model), processor.physical_cores
        memory = _rounded_gigabytes(capabilities.memory.total_bytes)
        rest = [_best_instructions(processor), f"{cores}c", memory]
        rest += [f"{processor.threads}t"] if processor.threads not in {None, cores} else []
    room = MAX_HARDWARE_BYTES - len("/".join([kind, "", *rest]))
    return HardwareClass("/".join([kind, title[:room].rstrip("-"), *rest]))


# Our name and the Linux name of each instruction set, from the best for matrix products down.
_INSTRUCTION_RANKS: Final = (
    ("amx", "amx_bf16"),
    ("avx512-bf16", "avx512_bf16"),
    ("avx512-vnni", "avx512_vnni"),
    ("avx512", "avx512f"),
    ("avx-vnni", "avx_vnni"),
    ("avx2", "avx2"),
    ("avx", "avx"),
    ("sme", "sme"),
    ("sve2", "sve2"),
    ("sve", "sve"),
    ("i8mm", "i8mm"),
    ("bf16", "bf16"),
    ("dotprod", "asimddp"),
    ("neon", "asimd"),
)
_GIGABYTE_STEPS: Final = (1, 2, 3, *(quarters << k for k in range(19) for quarters in (4, 5, 6, 7)))
_MAX_SLUG: Final = 48
_MAX_ARCHITECTURE: Final = 16
_NOT_THE_MAKE: Final = frozenset({"cpu", "processor", "gen", "with"})


def _best_instructions(processor: Processor) -> str:
    present = set(processor.instruction_sets)
    return next(
        (title for title, flag in _INSTRUCTION_RANKS if flag in present),
        _slug(processor.architecture[:_MAX_ARCHITECTURE]),
    )


def _make(model: str) -> str:
    """Return the make in a processor's model name: its first words without a digit, or all of them for Apple's."""
    words = re.findall(r"[a-z0-9.]+", re.sub(r"\((?:r|tm|c)\)", " ", model.lower()))
    if words[:1] != ["apple"]:
        words = list(dropwhile(_has_digit, words))
        words = list(takewhile(lambda word: not _has_digit(word), words))
    return _slug("-".join(word for word in words if word not in _NOT_THE_MAKE))


def _has_digit(word: str) -> bool:
    return any(map(str.isdigit, word))


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", text.lower())[:_MAX_SLUG].strip("-") or "unknown"


def _rounded_gigabytes(size: int) -> str:
    return f"{min(_GIGABYTE_STEPS, key=lambda step: max(step << 30, size) / min(step << 30, max(size, 1)))}g"


# Linux's names of the instruction sets that a fact stands for.
_VECTOR_BITS: Final = (("avx512f", 512), ("avx2", 256), ("avx", 256), ("sse4_2", 128), ("asimd", 128))
_BF16: Final = frozenset({"avx512_bf16", "amx_bf16", "bf16"})
_INT8: Final = frozenset({"avx512_vnni", "avx_vnni", "amx_int8", "i8mm", "asimddp"})
_MATRIX_UNIT: Final = frozenset({"amx_tile", "amx_bf16", "amx_int8", "sme"})


def stage_facts(
    capabilities: Capabilities, blocks: int, *, round_trip_s: float | None = None, link_bytes_per_s: float | None = None
) -> StageFacts:
    """Return the facts of a stage with so many blocks on a peer with these capabilities, and of its link."""
    processor = capabilities.processor
    present = set(processor.instruction_sets)
    accelerator = main_accelerator(capabilities)
    throughput: Throughput = processor.throughput if accelerator is None else accelerator.throughput
    return StageFacts(
        blocks=blocks,
        device=DeviceKind.CPU if accelerator is None else DeviceKind(accelerator.kind.value),
        memory_bytes=capabilities.memory.total_bytes if accelerator is None else accelerator.memory_bytes,
        threads=processor.threads or processor.physical_cores,
        vector_bits=next((bits for name, bits in _VECTOR_BITS if name in present), 0),
        bf16=bool(present & _BF16),
        int8=bool(present & _INT8),
        matrix_unit=bool(present & _MATRIX_UNIT),
        memory_read_bytes_per_s=throughput.memory_read_bytes_per_s,
        fp32_flop_per_s=throughput.fp32_flop_per_s,
        bf16_flop_per_s=throughput.bf16_flop_per_s,
        int8_op_per_s=throughput.int8_op_per_s,
        round_trip_s=None if round_trip_s is None else min(round_trip_s, MAX_ROUND_TRIP_S),
        link_bytes_per_s=link_bytes_per_s,
        price=USUAL_PRICE if capabilities.price is None else capabilities.price,
    )
