"""Probes the hardware and software that this node may use.

The limits of a container count, not the size of the host. Nothing heavy is imported: torch in the daemon would cost
seconds and hundreds of megabytes. A value that cannot be read is left out or estimated, never an error.
"""

import hashlib
import os
import platform
import re
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Final

import psutil

from node.util.child_process import ChildError, run_blocking
from protocol.canonical import canonical_json
from protocol.capabilities import MAX_WORD_BYTES, Capabilities, Memory, Processor, Software
from protocol.fields import CONTROL_CHARACTERS
from protocol.schema import to_map

ROOT: Final = Path("/")

INSTRUCTION_SETS: Final = frozenset({
    "avx", "avx2", "avx512_bf16", "avx512_fp16", "avx512_vnni", "avx512bw", "avx512f", "avx_vnni", "amx_bf16",
    "amx_int8", "amx_tile", "f16c", "fma", "sse4_2",
    "asimd", "asimddp", "asimdhp", "bf16", "i8mm", "sme", "sve", "sve2",
})  # fmt: skip
"""Instruction sets that determine the speed of matrix products, named as in /proc/cpuinfo: x86, then ARM."""

_APPLE_FEATURES: Final = {
    "hw.optional.AdvSIMD": "asimd",
    "hw.optional.arm.FEAT_BF16": "bf16",
    "hw.optional.arm.FEAT_DotProd": "asimddp",
    "hw.optional.arm.FEAT_I8MM": "i8mm",
    "hw.optional.arm.FEAT_SME": "sme",
    "hw.optional.avx2_0": "avx2",
    "hw.optional.avx512f": "avx512f",
}
_GPU_SELECTION: Final = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")
_SYSCTL_TIMEOUT_S: Final = 5.0


def probe(root: Path = ROOT) -> Capabilities:
    """Return the facts, without measurements and accelerators. Blocks: call it in a thread.

    `root`: the folder that contains /proc and /sys.
    """
    total_bytes = total_memory(root)
    memory = Memory(total_bytes=total_bytes, available_bytes=min(total_bytes, available_memory(root)))
    software = Software(
        metaswarm=_version("metaswarm") or "unknown",
        python=platform.python_version(),
        torch=_version("torch"),
        onnxruntime=_version("onnxruntime"),
        transformers=_version("transformers"),
    )
    return Capabilities(processor=_processor(root), memory=memory, software=software)


def available_memory(root: Path = ROOT) -> int:
    """Return the main memory, in bytes, that is available now."""
    memory = psutil.virtual_memory()
    limit = _memory_limit(root)
    if limit is None:
        return memory.available
    used = _first_integer(root, "sys/fs/cgroup/memory.current", "sys/fs/cgroup/memory/memory.usage_in_bytes") or 0
    return max(0, min(memory.available, limit - used))


def total_memory(root: Path = ROOT) -> int:
    """Return the main memory, in bytes, that this process may ever use."""
    total, limit = psutil.virtual_memory().total, _memory_limit(root)
    return total if limit is None else min(total, limit)


def fingerprint(facts: Capabilities, threads: int, root: Path = ROOT) -> str:
    """Return a hash that changes whenever earlier measurements may be outdated."""
    seen = to_map(facts)
    # The total varies by some bytes between boots.
    seen["memory"] = round(facts.memory.total_bytes / 2**30)
    seen["graphics"] = sorted(_graphics(root))
    seen["selection"] = [os.environ.get(name) for name in _GPU_SELECTION]
    seen["threads"] = threads
    return hashlib.sha256(canonical_json(seen)).hexdigest()


def _processor(root: Path) -> Processor:
    if sys.platform == "darwin":
        model = _sysctl("machdep.cpu.brand_string")
        flags = {name for feature, name in _APPLE_FEATURES.items() if _sysctl(feature) == "1"}
    else:
        model, flags = _parse_cpuinfo(_read(root / "proc/cpuinfo"))
    physical_cores, logical_cores = _usable_cores(root)
    return Processor(
        architecture=_text(platform.machine()),
        model=_text(model or platform.processor() or platform.machine(), 256),
        physical_cores=physical_cores,
        logical_cores=logical_cores,
        instruction_sets=tuple(sorted(INSTRUCTION_SETS & flags)),
    )


def _parse_cpuinfo(text: str) -> tuple[str, set[str]]:
    """Return model and flags in Linux's /proc/cpuinfo; on ARM the model is that of the board, or a code."""
    values: dict[str, str] = {}
    for key, value in re.findall(r"^([^:\n]*?)\s*:[ \t]*(.*)$", text, re.MULTILINE):
        values.setdefault(key.lower(), value.strip())
    model = values.get("model name", "")
    if not model and "cpu part" in values:
        code = f"ARM implementer {values.get('cpu implementer', '?')} part {values['cpu part']}"
        # On ARM the lower-case "model" is the board's; on x86 it is a number that comes with a model name.
        model = values.get("model") or values.get("hardware") or code
    return model, set((values.get("flags") or values.get("features") or "").split())


def _sysctl(name: str) -> str:
    try:
        return run_blocking(["/usr/sbin/sysctl", "-n", name], what="sysctl", time_limit_s=_SYSCTL_TIMEOUT_S).strip()
    except ChildError:
        return ""


def _usable_cores(root: Path) -> tuple[int, int]:
    """Return physical and logical cores, bounded by the affinity of the process and the quota of its container."""
    logical = psutil.cpu_count() or 1
    if sys.platform == "linux":
        logical = min(logical, len(os.sched_getaffinity(0)))
    quota = _processor_quota(root)
    if quota is not None:
        logical = max(1, min(logical, round(quota)))
    return min(psutil.cpu_count(logical=False) or logical, logical), logical


def _processor_quota(root: Path) -> float | None:
    """Return the quota of a control group, of version 2 or 1, in cores; None without a limit."""
    quota, _, period = _read(root / "sys/fs/cgroup/cpu.max").partition(" ")
    if not quota:
        quota = _read(root / "sys/fs/cgroup/cpu/cpu.cfs_quota_us")
        period = _read(root / "sys/fs/cgroup/cpu/cpu.cfs_period_us")
    try:
        cores = int(quota) / int(period)
    except (ValueError, ZeroDivisionError):
        return None  # "max", or no control groups at all
    return cores if cores > 0 else None


def _memory_limit(root: Path) -> int | None:
    # Version 1 encodes "no limit" as a number near 2**63, which the caller's minimum ignores.
    return _first_integer(root, "sys/fs/cgroup/memory.max", "sys/fs/cgroup/memory/memory.limit_in_bytes")


def _version(distribution: str) -> str | None:
    try:
        return _text(metadata.version(distribution))
    except metadata.PackageNotFoundError:
        return None


def _graphics(root: Path) -> Iterator[str]:
    """Yield the devices that drivers list: enough to detect that one was added or removed."""
    for path in root.glob("proc/driver/nvidia/gpus/*/information"):
        yield from (line for line in _read(path).splitlines() if line.startswith("Model:"))
    for path in root.glob("sys/class/drm/card*/device/device"):
        yield f"{_read(path.with_name('vendor'))}:{_read(path)}"


def _first_integer(root: Path, *names: str) -> int | None:
    for name in names:
        text = _read(root / name)
        if text.isdecimal():
            return int(text)
    return None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def _text(text: str, max_bytes: int = MAX_WORD_BYTES) -> str:
    """Return a text from the system as it may stand in a record: printable and short enough."""
    clean = CONTROL_CHARACTERS.sub(" ", text).strip()
    return clean.encode("utf-8")[:max_bytes].decode("utf-8", "ignore") or "unknown"
