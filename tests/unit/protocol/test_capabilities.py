from dataclasses import replace
from typing import Any

import pytest

from protocol.canonical import Value
from protocol.capabilities import (
    FORMAT_VERSION,
    MAX_ACCELERATORS,
    MAX_INSTRUCTION_SETS,
    MAX_NEIGHBOURS,
    MAX_WORD_BYTES,
    AcceleratorKind,
    Capabilities,
    CapabilityRecord,
    Links,
    Memory,
    Neighbour,
    capability_key,
    hardware_class,
)
from protocol.errors import LocalProtocolError, RemoteProtocolError
from protocol.figures import MAX_CORES, MAX_MEMORY_BYTES
from protocol.limits import MAX_RECORD_BYTES, MAX_TEXT_BYTES
from protocol.records import seal, select, sign, verify_dht_record, verify_record
from protocol.schema import from_map, to_map
from tests.support.capabilities import EPYC, GIB, H100, key_of, peer_of

NOW_S = 1_700_000_000
KEY, PEER = key_of(1), peer_of(1)
BEST = replace(EPYC, accelerators=(H100, H100))


def record(capabilities: Capabilities | None, *, sequence: int = 1) -> CapabilityRecord:
    return CapabilityRecord(
        peer=PEER, sequence=sequence, issued_at_s=NOW_S, expires_at_s=NOW_S + 1800, capabilities=capabilities
    )


def changed(path: str, value: object) -> dict[str, Value]:
    """Return the capabilities' map with the value at a dotted path replaced, or added."""
    document = to_map(BEST)
    node: Any = document
    *parents, last = path.split(".")
    for part in parents:
        node = node[int(part) if isinstance(node, list) else part]
    node[last] = value
    return document


def forged(**fields: Value) -> bytes:
    """Return a well signed record with some fields replaced, whether it makes sense or not."""
    header: dict[str, Value] = {"sequence": 1, "issued_at_s": NOW_S, "expires_at_s": NOW_S + 1}
    return sign("capability", header | {"version": FORMAT_VERSION, "capabilities": to_map(EPYC)} | fields, KEY)


@pytest.mark.parametrize("capabilities", [EPYC, BEST, None], ids=["cpu", "gpu", "withdrawn"])
def test_capability_record_round_trip_under_its_dht_key(capabilities: Capabilities | None) -> None:
    said = record(capabilities)
    assert verify_dht_record(CapabilityRecord, capability_key(PEER), seal(said, KEY), NOW_S) == said


def test_dht_key_contains_the_peer() -> None:
    assert capability_key(PEER) == f"/metaswarm/cap/{PEER}"


def test_rejects_record_under_dht_key_of_another_peer() -> None:
    with pytest.raises(RemoteProtocolError, match="under another key"):
        verify_dht_record(CapabilityRecord, capability_key(peer_of(2)), seal(record(EPYC), KEY), NOW_S)


def test_refuses_to_sign_for_another_peer() -> None:
    with pytest.raises(LocalProtocolError, match="the key is not that of"):
        seal(record(EPYC), key_of(2))


def test_withdrawal_supersedes_the_earlier_record() -> None:
    said, withdrawn = seal(record(EPYC, sequence=5), KEY), seal(record(None, sequence=6), KEY)
    assert select([said, withdrawn], NOW_S) == 1
    assert select([withdrawn, said], NOW_S) == 0


def test_largest_capability_record_fits_the_size_limit() -> None:
    neighbours = tuple(
        Neighbour(peer=peer_of(100 + n), round_trip_s=0.1, upload_bytes_per_s=1e6, download_bytes_per_s=1e6)
        for n in range(MAX_NEIGHBOURS)
    )
    eight = replace(EPYC, accelerators=(H100,) * 8, links=Links(neighbours=neighbours))
    assert len(seal(record(eight), KEY)) < MAX_RECORD_BYTES // 2


TOO_LONG = "x" * (MAX_TEXT_BYTES + 1)
A_NEIGHBOUR = {"peer": peer_of(3)}

IMPOSSIBLE = {
    "no cores": ("processor.physical_cores", 0),
    "more physical than logical cores": ("processor.physical_cores", 5),
    "too many cores": ("processor.logical_cores", MAX_CORES + 1),
    "cores that are a float": ("processor.logical_cores", 4.0),
    "a control character": ("processor.model", "\x1b[2J"),
    "no model": ("processor.model", ""),
    "a long model": ("processor.model", TOO_LONG),
    "a long architecture": ("processor.architecture", "x" * (MAX_WORD_BYTES + 1)),
    "instruction sets out of order": ("processor.instruction_sets", ["fma", "avx"]),
    "an instruction set twice": ("processor.instruction_sets", ["avx", "avx"]),
    "too many instruction sets": (
        "processor.instruction_sets",
        [f"set{n:03}" for n in range(MAX_INSTRUCTION_SETS + 1)],
    ),
    "no memory": ("memory.total_bytes", 0),
    "too much memory": ("memory.total_bytes", MAX_MEMORY_BYTES + 1),
    "more available than there is": ("memory.available_bytes", EPYC.memory.total_bytes + 1),
    "a bandwidth of nothing": ("processor.throughput.memory_read_bytes_per_s", 0.0),
    "a negative figure": ("processor.throughput.fp32_flop_per_s", -1.0),
    "an absurd figure": ("processor.throughput.fp32_flop_per_s", 1e300),
    "an integer figure": ("processor.throughput.fp32_flop_per_s", 1),
    "a gap spelt out": ("processor.throughput.fp32_flop_per_s", None),
    "an unknown dtype": ("processor.throughput.fp7_flop_per_s", 1.0),
    "an unknown kind of accelerator": ("accelerators.0.kind", "abacus"),
    "an accelerator without memory": ("accelerators.0.memory_bytes", 0),
    "too many accelerators": ("accelerators", [to_map(H100)] * (MAX_ACCELERATORS + 1)),
    "a disk faster than anything": ("disk_read_bytes_per_s", 1e18),
    "no version of ours": ("software.metaswarm", ""),
    "too many neighbours": ("links.neighbours", [{"peer": peer_of(200 + n)} for n in range(MAX_NEIGHBOURS + 1)]),
    "a neighbour twice": ("links.neighbours", [A_NEIGHBOUR, A_NEIGHBOUR]),
    "a neighbour that is no peer": ("links.neighbours", [{"peer": "somebody"}]),
    "a round trip of an hour": ("links.neighbours", [A_NEIGHBOUR | {"round_trip_s": 3600.0}]),
    "something nobody knows": ("colour", "red"),
}


@pytest.mark.parametrize(("path", "value"), IMPOSSIBLE.values(), ids=IMPOSSIBLE.keys())
def test_rejects_capabilities_out_of_bounds(path: str, value: object) -> None:
    with pytest.raises(RemoteProtocolError):
        from_map(Capabilities, changed(path, value), "capabilities")


def test_rejects_peer_as_its_own_neighbour() -> None:
    with pytest.raises(RemoteProtocolError, match="its own neighbour"):
        verify_record(CapabilityRecord, forged(capabilities=changed("links.neighbours", [{"peer": PEER}])), NOW_S)


def test_rejects_unknown_format_version() -> None:
    with pytest.raises(RemoteProtocolError, match="version"):
        verify_record(CapabilityRecord, forged(version=2), NOW_S)


def with_model(model: str, *sets: str) -> Capabilities:
    processor = replace(EPYC.processor, model=model, instruction_sets=tuple(sorted(sets)))
    return replace(EPYC, processor=processor)


CLASSES: dict[str, tuple[Capabilities, str]] = {
    "server": (EPYC, "cpu/amd-epyc/avx512-bf16/2c/24g"),
    "virtual machine": (with_model("AMD EPYC", "avx512f", "avx512_vnni"), "cpu/amd-epyc/avx512-vnni/2c/24g"),
    "xeon": (with_model("Intel(R) Xeon(R) CPU @ 2.20GHz", "avx2"), "cpu/intel-xeon/avx2/2c/24g"),
    "desktop": (with_model("13th Gen Intel(R) Core(TM) i9-13900K", "avx_vnni"), "cpu/intel-core/avx-vnni/2c/24g"),
    "apple": (with_model("Apple M2 Pro", "asimd", "i8mm"), "cpu/apple-m2-pro/i8mm/2c/24g"),
    "one thread": (replace(EPYC, processor=replace(EPYC.processor, threads=1)), "cpu/amd-epyc/avx512-bf16/2c/24g/1t"),
    "all cores named": (replace(EPYC, processor=replace(EPYC.processor, threads=2)), "cpu/amd-epyc/avx512-bf16/2c/24g"),
    "long name": (with_model("Words " * 30, "avx512_bf16"), f"cpu/words{'-words' * 6}/avx512-bf16/2c/24g"),
    "unheard of": (with_model("12345"), "cpu/unknown/x86-64/2c/24g"),
    "gpu": (replace(EPYC, accelerators=(H100,)), "cuda/nvidia-h100-80gb-hbm3/1x/80g"),
    "gpus": (BEST, "cuda/nvidia-h100-80gb-hbm3/2x/80g"),
    "mixed gpus": (
        replace(EPYC, accelerators=(replace(H100, name="NVIDIA T4", memory_bytes=15 * GIB), H100)),
        "cuda/nvidia-h100-80gb-hbm3/1x/80g",
    ),
    "rocm": (
        replace(EPYC, accelerators=(replace(H100, kind=AcceleratorKind.ROCM, name="AMD Instinct MI300X"),)),
        "rocm/amd-instinct-mi300x/1x/80g",
    ),
}


@pytest.mark.parametrize(("capabilities", "expected"), CLASSES.values(), ids=CLASSES.keys())
def test_hardware_class_of_known_machines(capabilities: Capabilities, expected: str) -> None:
    assert hardware_class(capabilities) == expected


def test_hardware_class_ignores_memory_reserved_by_the_system() -> None:
    classes = {
        hardware_class(replace(EPYC, memory=Memory(total_bytes=int(total * GIB), available_bytes=0)))
        for total in (23.1, 23.5, 24.0)
    }
    assert len(classes) == 1
