"""Which of a node's GPUs serve which of its spans."""

from dataclasses import replace
from typing import Any

import pytest

from node.engine.device import CPU, Device
from node.stages.device_shares import (
    DeviceShare,
    cpu_bytes_of_each,
    longest_over,
    shares_of_spans,
    split_over,
    usable_shares,
)
from node.stages.memory_admission import span_bytes_for
from protocol.identity import BlockRange
from tests.support.job_peers import FakeLibrary

GPUS = [Device(f"cuda:{number}", 1 << 40) for number in range(3)]
SHARES = [DeviceShare(gpu.name, 1 << 30) for gpu in GPUS]


async def manifest_of(**changes: Any) -> Any:
    return replace(await FakeLibrary().manifest("fake"), **changes)


@pytest.mark.parametrize(
    ("spans", "expected"),
    [
        (1, [["cuda:0 8", "cuda:1 16", "cuda:2 24"]]),
        (2, [["cuda:0 8", "cuda:2 24"], ["cuda:1 16"]]),
        (3, [["cuda:0 8"], ["cuda:1 16"], ["cuda:2 24"]]),
        (4, [["cuda:0 4"], ["cuda:1 16"], ["cuda:2 24"], ["cuda:0 4"]]),
    ],
)
def test_spans_and_devices_are_dealt_out_to_each_other(spans: int, expected: list[list[str]]) -> None:
    shares = shares_of_spans(GPUS, [8, 16, 24], spans)
    assert [[f"{share.device} {share.memory_bytes}" for share in each] for each in shares] == expected


def test_draft_model_has_one_device_of_its_own_where_there_are_enough() -> None:
    shares = shares_of_spans(GPUS, [8, 16, 24], 1, draft=True)
    assert [[share.device for share in each] for each in shares] == [["cuda:0", "cuda:1"], ["cuda:2"]]
    shares = shares_of_spans(GPUS[:1], [8], 1, draft=True)
    assert shares == [(DeviceShare("cuda:0", 4),), (DeviceShare("cuda:0", 4),)]


async def test_parts_fill_devices_of_any_size_equally() -> None:
    manifest = await manifest_of()
    block_bytes = span_bytes_for(manifest, BlockRange(1, 2), "cuda:0")
    shares = [DeviceShare("cuda:0", 2 * block_bytes), DeviceShare("cuda:1", 6 * block_bytes)]
    first, second = split_over(manifest, BlockRange(0, 9), shares)
    assert (first.start, first.end, second.end) == (0, second.start, 9)
    assert len(first) in (1, 2)
    assert split_over(manifest, BlockRange(3, 4), shares) == [BlockRange(3, 4)], "a block is not divided"
    assert split_over(manifest, BlockRange(2, 9), shares[:1]) == (BlockRange(2, 9),)
    longest = longest_over(manifest, shares)
    assert longest[8] == 1
    assert longest[2] > longest_over(manifest, shares[:1])[2]


async def test_parts_end_where_the_model_may_be_cut() -> None:
    manifest = await manifest_of(granularity=4)
    shares = [DeviceShare(gpu.name, 1 << 30) for gpu in GPUS]
    assert split_over(manifest, BlockRange(0, 9), shares) == [BlockRange(0, 4), BlockRange(4, 8), BlockRange(8, 9)]


@pytest.mark.parametrize(("version", "expected"), [("2026.10.1", [DeviceShare(CPU, 5)]), ("2026.10.1+cu128", SHARES)])
async def test_gguf_package_is_planned_where_the_build_of_llama_cpp_computes(
    version: str, expected: list[DeviceShare], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda _name: version)
    monkeypatch.setattr("sys.platform", "linux")
    gguf = await manifest_of(format="gguf")
    assert list(usable_shares(gguf, SHARES, 5)) == expected
    assert usable_shares(gguf, [DeviceShare(CPU, 3)], 5) == [DeviceShare(CPU, 3)]
    assert usable_shares(await manifest_of(), SHARES, 5) is SHARES


def test_main_memory_is_for_all_spans_together() -> None:
    assert cpu_bytes_of_each(12, 3) == 4
