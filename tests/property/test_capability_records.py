import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.capabilities import (
    MAX_INSTRUCTION_SETS,
    MAX_NEIGHBOURS,
    MAX_WORD_BYTES,
    Accelerator,
    AcceleratorKind,
    Capabilities,
    CapabilityRecord,
    Links,
    Memory,
    Neighbour,
    Processor,
    Software,
    Throughput,
    hardware_class,
)
from protocol.errors import RemoteProtocolError
from protocol.figures import (
    MAX_BYTES_PER_S,
    MAX_CORES,
    MAX_MEMORY_BYTES,
    MAX_OPERATIONS_PER_S,
    MAX_ROUND_TRIP_S,
    MIN_FIGURE,
)
from protocol.identity import PeerId, peer_id_from_public_key
from protocol.limits import MAX_HARDWARE_BYTES, MAX_NAME_BYTES
from protocol.records import seal, verify_record
from protocol.schema import from_map, to_map
from tests.support.capabilities import EPYC, key_of, peer_of

NOW_S = 1_700_000_000

letters = st.characters(min_codepoint=0xA0, exclude_categories=("Cs", "Cc")) | st.characters(
    min_codepoint=0x20, max_codepoint=0x7E
)


def words(max_bytes: int) -> st.SearchStrategy[str]:
    return st.text(letters, min_size=1, max_size=max_bytes // 4)


def figures(high: float) -> st.SearchStrategy[float | None]:
    return st.none() | st.floats(MIN_FIGURE, high)


rates = figures(MAX_BYTES_PER_S)
operations = figures(MAX_OPERATIONS_PER_S)
throughputs = st.builds(
    Throughput,
    memory_read_bytes_per_s=rates,
    fp32_flop_per_s=operations,
    bf16_flop_per_s=operations,
    int8_op_per_s=operations,
)
memories = st.integers(1, MAX_MEMORY_BYTES).flatmap(
    lambda total: st.builds(Memory, total_bytes=st.just(total), available_bytes=st.integers(0, total))
)
processors = st.integers(1, MAX_CORES).flatmap(
    lambda cores: st.builds(
        Processor,
        architecture=words(MAX_WORD_BYTES),
        model=words(MAX_NAME_BYTES),
        physical_cores=st.integers(1, cores),
        logical_cores=st.just(cores),
        instruction_sets=st.sets(words(MAX_WORD_BYTES), max_size=MAX_INSTRUCTION_SETS).map(
            lambda found: tuple(sorted(found))
        ),
        throughput=throughputs,
    )
)
accelerators = st.builds(
    Accelerator,
    kind=st.sampled_from(AcceleratorKind),
    name=words(MAX_NAME_BYTES),
    memory_bytes=st.integers(1, MAX_MEMORY_BYTES),
    compute_capability=st.just("") | words(MAX_WORD_BYTES),
    throughput=throughputs,
)
versions = st.none() | words(MAX_WORD_BYTES)
peers: st.SearchStrategy[PeerId] = st.binary(min_size=32, max_size=32).map(peer_id_from_public_key)
neighbours = st.builds(
    Neighbour, peer=peers, round_trip_s=figures(MAX_ROUND_TRIP_S), upload_bytes_per_s=rates, download_bytes_per_s=rates
)
links = st.builds(
    Links,
    upload_bytes_per_s=rates,
    download_bytes_per_s=rates,
    neighbours=st.lists(neighbours, max_size=MAX_NEIGHBOURS, unique_by=lambda neighbour: neighbour.peer).map(tuple),
)
capabilities = st.builds(
    Capabilities,
    processor=processors,
    memory=memories,
    software=st.builds(
        Software,
        metaswarm=words(MAX_WORD_BYTES),
        python=words(MAX_WORD_BYTES),
        torch=versions,
        onnxruntime=versions,
        transformers=versions,
    ),
    accelerators=st.lists(accelerators, max_size=4).map(tuple),
    disk_read_bytes_per_s=rates,
    links=links,
)


@settings(max_examples=50)
@given(capabilities | st.none())
def test_record_round_trip(said: Capabilities | None) -> None:
    record = CapabilityRecord(
        peer=peer_of(1), sequence=1, issued_at_s=NOW_S, expires_at_s=NOW_S + 60, capabilities=said
    )
    assert verify_record(CapabilityRecord, seal(record, key_of(1)), NOW_S) == record


@settings(max_examples=50)
@given(capabilities)
def test_capabilities_round_trip_through_json(said: Capabilities) -> None:
    assert from_map(Capabilities, json.loads(json.dumps(to_map(said))), "capabilities") == said


@settings(max_examples=50)
@given(capabilities)
def test_hardware_class_is_short_and_canonical(said: Capabilities) -> None:
    found = hardware_class(said)
    assert found.isascii()
    assert len(found) <= MAX_HARDWARE_BYTES
    assert found.count("/") in {3, 4, 5}
    assert " " not in found
    assert all(found.split("/"))


LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.binary(max_size=5)
JUNK = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
)


@given(st.sampled_from([*to_map(EPYC)]), JUNK)
def test_junk_in_any_field_raises_remote_error(field: str, junk: object) -> None:
    document: dict[str, object] = {**to_map(EPYC), field: junk}
    try:
        from_map(Capabilities, document, "capabilities")
    except RemoteProtocolError:
        return
    # What is taken is what it pretends to be: no junk that happens to look like nothing.
    assert field == "accelerators" or (field == "disk_read_bytes_per_s" and isinstance(junk, float))


@given(JUNK)
def test_junk_instead_of_capabilities_raises_remote_error(junk: object) -> None:
    with pytest.raises(RemoteProtocolError):
        from_map(Capabilities, junk, "capabilities")
