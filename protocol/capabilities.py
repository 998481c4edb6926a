"""Capability records: on what hardware a peer runs, what it measured of it, and what it saw of its links.

Everything here is the peer's own word, signed and bounded. It serves to describe and to predict; what was measured in
common work decides.
"""

import enum
import re
from dataclasses import dataclass
from itertools import dropwhile, takewhile
from typing import ClassVar, Final, NewType, Self

from protocol.canonical import Value
from protocol.errors import RemoteProtocolError
from protocol.fields import Fields, name, peer_id
from protocol.identity import PeerId, parse_peer_id
from protocol.limits import MAX_TEXT_BYTES
from protocol.records import DHT_NAMESPACE, Header, Record, unseal

CAPABILITY_TOPIC: Final = "metaswarm/1/capabilities"
"""The gossip topic of capability records."""

CAPABILITY_KIND: Final = "cap"
"""The second part of the DHT key of a capability record."""

FORMAT_VERSION: Final = 1

MAX_CORES: Final = 1 << 16
MAX_INSTRUCTION_SETS: Final = 32
MAX_ACCELERATORS: Final = 64
MAX_NEIGHBOURS: Final = 16
MAX_MEMORY_BYTES: Final = 1 << 50
MAX_BYTES_PER_S: Final = 1e15
MAX_OPERATIONS_PER_S: Final = 1e19
MAX_ROUND_TRIP_S: Final = 60.0
MAX_WORD_BYTES: Final = 64
"""A version, the name of an instruction set or of an architecture."""

MIN_FIGURE: Final = 1e-9
"""What is measured is above zero: nothing divides by it in vain."""

HardwareClass = NewType("HardwareClass", str)
"""A short canonical text that like hardware has in common, see `hardware_class`."""


class AcceleratorKind(enum.StrEnum):
    """The family of programming interfaces through which an accelerator is reached."""

    CUDA = "cuda"
    ROCM = "rocm"
    MPS = "mps"


@dataclass(frozen=True, slots=True, kw_only=True)
class Throughput:
    """What a device sustains, measured; None is a gap: not measured, or not possible there."""

    memory_read_bytes_per_s: float | None = None
    fp32_flop_per_s: float | None = None
    """Matrix products; a multiplication and an addition are two operations."""
    bf16_flop_per_s: float | None = None
    int8_op_per_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Processor:
    """The CPU, as much of it as the node may use."""

    architecture: str
    """As the operating system says it: `x86_64`, `aarch64`, `arm64`."""
    model: str
    physical_cores: int
    logical_cores: int
    instruction_sets: tuple[str, ...] = ()
    """Those that matter to matrix products, by the names that Linux gives them, sorted."""
    throughput: Throughput = Throughput()


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Main memory, as much of it as the node may use."""

    total_bytes: int
    available_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Accelerator:
    """A GPU."""

    kind: AcceleratorKind
    name: str
    memory_bytes: int
    compute_capability: str = ""
    """`9.0` for CUDA, `gfx942` for ROCm; empty where there is no such thing."""
    throughput: Throughput = Throughput()


@dataclass(frozen=True, slots=True, kw_only=True)
class Software:
    """Versions; None is not installed."""

    metaswarm: str
    python: str
    torch: str | None = None
    onnxruntime: str | None = None
    transformers: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Neighbour:
    """A peer with whom there was traffic of late; None where there was not enough to tell."""

    peer: PeerId
    round_trip_s: float | None = None
    """Median."""
    upload_bytes_per_s: float | None = None
    download_bytes_per_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Links:
    """What real traffic showed of the peer's connection: the best sustained rates to any neighbour, and each one's."""

    upload_bytes_per_s: float | None = None
    download_bytes_per_s: float | None = None
    neighbours: tuple[Neighbour, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Capabilities:
    """What a peer has to offer."""

    processor: Processor
    memory: Memory
    software: Software
    accelerators: tuple[Accelerator, ...] = ()
    disk_read_bytes_per_s: float | None = None
    """Where models are kept, past the operating system's cache."""
    links: Links = Links()


@dataclass(frozen=True, slots=True, kw_only=True)
class CapabilityRecord(Record):
    """What a peer says of itself; `capabilities` is None once it has withdrawn, that is left."""

    kind: ClassVar[str] = "capability"

    capabilities: Capabilities | None

    def body(self) -> dict[str, Value]:
        """Return the fields of this kind as they travel."""
        offered = None if self.capabilities is None else capabilities_to_map(self.capabilities)
        return {"version": FORMAT_VERSION, "capabilities": offered}

    @classmethod
    def from_fields(cls, peer: PeerId, header: Header, fields: Fields) -> Self:
        """Return the record made of the fields of this kind. Raises RemoteProtocolError."""
        fields.integer("version", FORMAT_VERSION, FORMAT_VERSION)
        offered = fields.take("capabilities")
        capabilities = None if offered is None else capabilities_from(offered, "capabilities")
        if capabilities is not None and any(neighbour.peer == peer for neighbour in capabilities.links.neighbours):
            raise RemoteProtocolError("capability record: a peer is its own neighbour")
        return cls(
            peer=peer,
            sequence=header.sequence,
            issued_at_s=header.issued_at_s,
            expires_at_s=header.expires_at_s,
            capabilities=capabilities,
        )


def capability_key(peer: PeerId) -> str:
    """Return the DHT key of a peer's capability record."""
    return f"/{DHT_NAMESPACE}/{CAPABILITY_KIND}/{peer}"


def parse_capability_key(key: str) -> PeerId:
    """Return the peer in the DHT key of a capability record; raise ValueError for any other key."""
    parts = key.split("/")
    if len(parts) != 4 or parts[:3] != ["", DHT_NAMESPACE, CAPABILITY_KIND]:
        raise ValueError(f"{key[:200]!r} is no key of a capability record")
    return parse_peer_id(parts[3])


def unseal_capabilities(key: str, envelope: bytes, now_s: float) -> CapabilityRecord:
    """Return the capability record found under a DHT key. Raises RemoteProtocolError, also when it belongs elsewhere.

    `now_s`: Unix time by our clock.
    """
    record = unseal(CapabilityRecord, envelope, now_s)
    if capability_key(record.peer) != key:
        raise RemoteProtocolError(f"capability record of {record.peer} lies under another key")
    return record


def fastest_bytes_per_s(capabilities: Capabilities) -> float | None:
    """Return what the peer says the fastest of its memories sustains; None where nothing was measured."""
    sustained = [capabilities.processor.throughput, *(each.throughput for each in capabilities.accelerators)]
    return max((rate for each in sustained if (rate := each.memory_read_bytes_per_s)), default=None)


def hardware_class(capabilities: Capabilities) -> HardwareClass:
    """Return the short text that like hardware has in common.

    With an accelerator, of which the one with the most memory counts: kind, name, how many of them, memory of each, as
    in `cuda/nvidia-h200/1x/144g`. Without: the processor's make, the best of its instruction sets for matrix products,
    physical cores, memory, as in `cpu/amd-epyc/avx512-bf16/2c/24g`. Memory is rounded to the nearest power of two or
    three times one, because what of it the system keeps for itself makes no difference.
    """
    if capabilities.accelerators:
        best = max(capabilities.accelerators, key=lambda device: (device.memory_bytes, device.name))
        count = sum((device.kind, device.name) == (best.kind, best.name) for device in capabilities.accelerators)
        parts = [best.kind.value, _slug(best.name), f"{count}x", _rounded_gigabytes(best.memory_bytes)]
    else:
        processor = capabilities.processor
        memory = _rounded_gigabytes(capabilities.memory.total_bytes)
        parts = ["cpu", _make(processor.model), _best_instructions(processor), f"{processor.physical_cores}c", memory]
    return HardwareClass("/".join(parts))


# From the best for matrix products down; on its left what an instruction set is called here.
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
_NOT_THE_MAKE: Final = frozenset({"cpu", "processor", "gen", "with"})


def _best_instructions(processor: Processor) -> str:
    present = set(processor.instruction_sets)
    return next((title for title, flag in _INSTRUCTION_RANKS if flag in present), _slug(processor.architecture))


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


# Values as they travel and back: maps of text, numbers and maps, which are JSON as well. A gap is left out.


def capabilities_to_map(capabilities: Capabilities) -> dict[str, Value]:
    """Return capabilities as a map of text, numbers and maps, as they travel and as they read in JSON."""
    software = capabilities.software
    return {
        "processor": _processor_to_map(capabilities.processor),
        "memory": {
            "total_bytes": capabilities.memory.total_bytes,
            "available_bytes": capabilities.memory.available_bytes,
        },
        "software": _present(
            metaswarm=software.metaswarm,
            python=software.python,
            torch=software.torch,
            onnxruntime=software.onnxruntime,
            transformers=software.transformers,
        ),
        "accelerators": [accelerator_to_map(accelerator) for accelerator in capabilities.accelerators],
        **_present(disk_read_bytes_per_s=capabilities.disk_read_bytes_per_s),
        "links": _links_to_map(capabilities.links),
    }


def capabilities_from(value: object, what: str) -> Capabilities:
    """Return the capabilities in a map. Raises RemoteProtocolError for what is missing, unknown or impossible."""
    fields = Fields(value, what)
    capabilities = Capabilities(
        processor=_processor_from(fields.take("processor"), "processor"),
        memory=_memory_from(fields.take("memory"), "memory"),
        software=_software_from(fields.take("software"), "software"),
        accelerators=tuple(
            accelerator_from(item, "accelerator") for item in fields.array("accelerators", MAX_ACCELERATORS)
        ),
        disk_read_bytes_per_s=_figure(fields, "disk_read_bytes_per_s", MAX_BYTES_PER_S),
        links=_links_from(fields.take("links"), "links"),
    )
    fields.finish()
    return capabilities


def throughput_to_map(throughput: Throughput) -> dict[str, Value]:
    """Return measured figures as a map."""
    return _present(
        memory_read_bytes_per_s=throughput.memory_read_bytes_per_s,
        fp32_flop_per_s=throughput.fp32_flop_per_s,
        bf16_flop_per_s=throughput.bf16_flop_per_s,
        int8_op_per_s=throughput.int8_op_per_s,
    )


def throughput_from(value: object, what: str) -> Throughput:
    """Return the measured figures in a map. Raises RemoteProtocolError."""
    fields = Fields(value, what)
    throughput = Throughput(
        memory_read_bytes_per_s=_figure(fields, "memory_read_bytes_per_s", MAX_BYTES_PER_S),
        fp32_flop_per_s=_figure(fields, "fp32_flop_per_s", MAX_OPERATIONS_PER_S),
        bf16_flop_per_s=_figure(fields, "bf16_flop_per_s", MAX_OPERATIONS_PER_S),
        int8_op_per_s=_figure(fields, "int8_op_per_s", MAX_OPERATIONS_PER_S),
    )
    fields.finish()
    return throughput


def accelerator_to_map(accelerator: Accelerator) -> dict[str, Value]:
    """Return an accelerator as a map."""
    return {
        "kind": accelerator.kind.value,
        "name": accelerator.name,
        "memory_bytes": accelerator.memory_bytes,
        "compute_capability": accelerator.compute_capability,
        "throughput": throughput_to_map(accelerator.throughput),
    }


def accelerator_from(value: object, what: str) -> Accelerator:
    """Return the accelerator in a map. Raises RemoteProtocolError."""
    fields = Fields(value, what)
    accelerator = Accelerator(
        kind=fields.choice("kind", AcceleratorKind),
        name=fields.name("name", MAX_TEXT_BYTES),
        memory_bytes=fields.integer("memory_bytes", 1, MAX_MEMORY_BYTES),
        compute_capability=fields.text("compute_capability", MAX_WORD_BYTES),
        throughput=throughput_from(fields.take("throughput"), f"{what} throughput"),
    )
    fields.finish()
    return accelerator


def _processor_to_map(processor: Processor) -> dict[str, Value]:
    return {
        "architecture": processor.architecture,
        "model": processor.model,
        "physical_cores": processor.physical_cores,
        "logical_cores": processor.logical_cores,
        "instruction_sets": list(processor.instruction_sets),
        "throughput": throughput_to_map(processor.throughput),
    }


def _processor_from(value: object, what: str) -> Processor:
    fields = Fields(value, what)
    logical_cores = fields.integer("logical_cores", 1, MAX_CORES)
    processor = Processor(
        architecture=fields.name("architecture", MAX_WORD_BYTES),
        model=fields.name("model", MAX_TEXT_BYTES),
        physical_cores=fields.integer("physical_cores", 1, logical_cores),
        logical_cores=logical_cores,
        instruction_sets=tuple(
            name(item, MAX_WORD_BYTES, f"{what} instruction set")
            for item in fields.array("instruction_sets", MAX_INSTRUCTION_SETS)
        ),
        throughput=throughput_from(fields.take("throughput"), f"{what} throughput"),
    )
    fields.finish()
    if list(processor.instruction_sets) != sorted(set(processor.instruction_sets)):
        raise RemoteProtocolError(f"{what} instruction sets are not sorted, or one comes twice")
    return processor


def _memory_from(value: object, what: str) -> Memory:
    fields = Fields(value, what)
    total_bytes = fields.integer("total_bytes", 1, MAX_MEMORY_BYTES)
    memory = Memory(total_bytes=total_bytes, available_bytes=fields.integer("available_bytes", 0, total_bytes))
    fields.finish()
    return memory


def _software_from(value: object, what: str) -> Software:
    fields = Fields(value, what)
    software = Software(
        metaswarm=fields.name("metaswarm", MAX_WORD_BYTES),
        python=fields.name("python", MAX_WORD_BYTES),
        torch=_name_if_any(fields, "torch"),
        onnxruntime=_name_if_any(fields, "onnxruntime"),
        transformers=_name_if_any(fields, "transformers"),
    )
    fields.finish()
    return software


def _links_to_map(links: Links) -> dict[str, Value]:
    return {
        **_present(upload_bytes_per_s=links.upload_bytes_per_s, download_bytes_per_s=links.download_bytes_per_s),
        "neighbours": [
            _present(
                peer=neighbour.peer,
                round_trip_s=neighbour.round_trip_s,
                upload_bytes_per_s=neighbour.upload_bytes_per_s,
                download_bytes_per_s=neighbour.download_bytes_per_s,
            )
            for neighbour in links.neighbours
        ],
    }


def _links_from(value: object, what: str) -> Links:
    fields = Fields(value, what)
    links = Links(
        upload_bytes_per_s=_figure(fields, "upload_bytes_per_s", MAX_BYTES_PER_S),
        download_bytes_per_s=_figure(fields, "download_bytes_per_s", MAX_BYTES_PER_S),
        neighbours=tuple(_neighbour_from(item, "neighbour") for item in fields.array("neighbours", MAX_NEIGHBOURS)),
    )
    fields.finish()
    if len({neighbour.peer for neighbour in links.neighbours}) != len(links.neighbours):
        raise RemoteProtocolError(f"{what}: a neighbour comes twice")
    return links


def _neighbour_from(value: object, what: str) -> Neighbour:
    fields = Fields(value, what)
    neighbour = Neighbour(
        peer=peer_id(fields.take("peer"), f"{what} peer"),
        round_trip_s=_figure(fields, "round_trip_s", MAX_ROUND_TRIP_S),
        upload_bytes_per_s=_figure(fields, "upload_bytes_per_s", MAX_BYTES_PER_S),
        download_bytes_per_s=_figure(fields, "download_bytes_per_s", MAX_BYTES_PER_S),
    )
    fields.finish()
    return neighbour


def _present(**values: Value) -> dict[str, Value]:
    return {key: value for key, value in values.items() if value is not None}


def _figure(fields: Fields, key: str, high: float) -> float | None:
    return fields.number(key, MIN_FIGURE, high) if key in fields else None


def _name_if_any(fields: Fields, key: str) -> str | None:
    return fields.name(key, MAX_WORD_BYTES) if key in fields else None
