import platform
import sys
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from node.capabilities.probe import available_memory, fingerprint, probe
from protocol.capabilities import Capabilities, hardware_class
from protocol.schema import from_map, to_map
from tests.support.capabilities import EPYC

RASPBERRY = """\
processor	: 0
BogoMIPS	: 108.00
Features	: fp asimd evtstrm crc32 cpuid asimddp
CPU implementer	: 0x41
CPU part	: 0xd0b

Revision	: d04170
Model		: Raspberry Pi 5 Model B Rev 1.0
"""
GRAVITON = """\
processor	: 0
Features	: fp asimd asimdhp asimddp sve i8mm bf16
CPU implementer	: 0x41
CPU part	: 0xd40
"""
XEON = """\
processor	: 0
vendor_id	: GenuineIntel
cpu family	: 6
model		: 85
model name	: Intel(R) Xeon(R) Platinum 8259CL CPU @ 2.50GHz
flags		: fpu sse4_2 fma avx avx2 avx512f avx512_vnni

processor	: 1
model name	: another
"""

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's /proc and /sys")


def write(root: Path, name: str, text: str) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_probe_of_this_machine_yields_a_valid_record() -> None:
    facts = probe()
    assert from_map(Capabilities, to_map(facts), "capabilities") == facts
    assert facts.memory.total_bytes <= psutil.virtual_memory().total
    assert facts.software.python == platform.python_version()
    assert facts.software.torch is not None
    assert hardware_class(facts).startswith("cpu/")


@linux_only
@pytest.mark.parametrize(
    ("cpuinfo", "model", "sets"),
    [
        (XEON, "Intel(R) Xeon(R) Platinum 8259CL CPU @ 2.50GHz", "avx avx2 avx512_vnni avx512f fma sse4_2"),
        (RASPBERRY, "Raspberry Pi 5 Model B Rev 1.0", "asimd asimddp"),
        (GRAVITON, "ARM implementer 0x41 part 0xd40", "asimd asimddp asimdhp bf16 i8mm sve"),
    ],
    ids=["xeon", "raspberry", "graviton"],
)
def test_the_processor_is_recognised(tmp_path: Path, cpuinfo: str, model: str, sets: str) -> None:
    write(tmp_path, "proc/cpuinfo", cpuinfo)
    processor = probe(tmp_path).processor
    assert (processor.model, processor.instruction_sets) == (model, tuple(sets.split()))


@pytest.mark.parametrize("cpuinfo", [None, "", "model name\t: \x1b[2J\n", "garbage", "\x00\xff" * 100])
def test_unreadable_system_files_are_not_an_error(tmp_path: Path, cpuinfo: str | None) -> None:
    if cpuinfo is not None:
        write(tmp_path, "proc/cpuinfo", cpuinfo)
    facts = probe(tmp_path)
    assert from_map(Capabilities, to_map(facts), "capabilities") == facts


@linux_only
@pytest.mark.parametrize(
    "limits",
    [
        {"cpu.max": "100000 100000\n", "memory.max": "1073741824\n", "memory.current": "1000000000\n"},
        {
            "cpu/cpu.cfs_quota_us": "50000\n",
            "cpu/cpu.cfs_period_us": "100000\n",
            "memory/memory.limit_in_bytes": "1073741824\n",
            "memory/memory.usage_in_bytes": "1000000000\n",
        },
    ],
    ids=["version 2", "version 1"],
)
def test_the_limits_of_a_container_count(tmp_path: Path, limits: dict[str, str]) -> None:
    for name, text in limits.items():
        write(tmp_path, f"sys/fs/cgroup/{name}", text)
    facts = probe(tmp_path)
    assert (facts.processor.physical_cores, facts.processor.logical_cores) == (1, 1)
    assert facts.memory.total_bytes == 1 << 30
    assert facts.memory.available_bytes == (1 << 30) - 1_000_000_000
    assert available_memory(tmp_path) == (1 << 30) - 1_000_000_000


@linux_only
@pytest.mark.parametrize(
    "limits",
    [
        {"cpu.max": "max 100000\n", "memory.max": "max\n"},
        {"cpu/cpu.cfs_quota_us": "-1\n", "memory/memory.limit_in_bytes": "9223372036854771712\n"},
    ],
    ids=["version 2", "version 1"],
)
def test_container_without_limits_has_none(tmp_path: Path, limits: dict[str, str]) -> None:
    for name, text in limits.items():
        write(tmp_path, f"sys/fs/cgroup/{name}", text)
    facts, unlimited = probe(tmp_path), probe(tmp_path / "nowhere")
    assert facts.memory.total_bytes == unlimited.memory.total_bytes
    assert facts.processor == unlimited.processor


def test_measurements_hold_while_hardware_and_software_are_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def current() -> str:
        return fingerprint(EPYC, 2, tmp_path)

    known = current()
    used = replace(EPYC, memory=replace(EPYC.memory, available_bytes=1))
    assert fingerprint(used, 2, tmp_path) == known
    upgraded = replace(EPYC, software=replace(EPYC.software, torch="2.14.0"))
    assert fingerprint(upgraded, 2, tmp_path) != known
    assert fingerprint(EPYC, 1, tmp_path) != known
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert current() != known
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    write(tmp_path, "proc/driver/nvidia/gpus/0000:01:00.0/information", "Model: \t NVIDIA T4\nIRQ: 7\n")
    with_gpu = current()
    assert with_gpu != known
    write(tmp_path, "proc/driver/nvidia/gpus/0000:01:00.0/information", "Model: \t NVIDIA T4\nIRQ: 8\n")
    assert current() == with_gpu
