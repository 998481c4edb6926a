"""The device that an engine computes on; free of torch. `node.engine.device_probe` is the process that asks torch."""

import importlib.metadata
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import psutil
import structlog

from node.util.child_process import ChildError, run
from node.util.interpreter import python
from protocol.capabilities import Accelerator
from protocol.errors import RemoteProtocolError
from protocol.schema import from_map, to_map

AUTO: Final = "auto"
ALL: Final = "all"
CPU: Final = "cpu"
TIME_LIMIT_S: Final = 60.0
"""Importing torch takes seconds; longer on a machine that swaps, or has many GPUs to initialise."""

COMMAND: Final = python("-m", "node.engine.device_probe")
DRIVERS: Final = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")
"""Present with NVIDIA's driver, with AMD's, and with either inside Windows; without them no probe is started."""

_logger = structlog.get_logger(__name__)


class DeviceError(Exception):
    """The device is unavailable. The message is one line."""


@dataclass(frozen=True, slots=True)
class Device:
    """A compute device.

    `name`: torch's, with a number where there can be several: `cpu`, `cuda:0`, `mps`. `free_bytes`: of its memory, at
    the time of the probe. `accelerator`: its description, without throughput; None for the CPU.
    """

    name: str
    free_bytes: int
    accelerator: Accelerator | None = None

    def to_json(self) -> dict[str, Any]:
        """Return it as a document."""
        accelerator = self.accelerator and to_map(self.accelerator)
        return {"name": self.name, "free_bytes": self.free_bytes, "accelerator": accelerator}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Device":
        """Return the device in a document. Raises ValueError, TypeError, KeyError, RemoteProtocolError."""
        found = values["accelerator"]
        return cls(values["name"], values["free_bytes"], found and from_map(Accelerator, found, "accelerator"))


def parse_devices(document: bytes | str) -> tuple[Device, ...]:
    """Return the devices in a document: one at least. Raises DeviceError."""
    try:
        first, *others = (Device.from_json(values) for values in json.loads(document))
    except (ValueError, TypeError, KeyError, RemoteProtocolError) as error:
        raise DeviceError(f"malformed answer from the device probe: {error}") from None
    return (first, *others)


def llamacpp_has_gpu() -> bool:
    """Return whether the installed build of llama.cpp can compute on a GPU; by its version, as loading it takes memory.

    The wheel of PyPI has Metal on macOS, and no GPU elsewhere; builds for one have a label, as `+cu128`.
    """
    try:
        return sys.platform == "darwin" or "+" in importlib.metadata.version("xllamacpp")
    except importlib.metadata.PackageNotFoundError:
        return False


def cpu_device() -> Device:
    """Return the CPU with the main memory that is available now."""
    return Device(CPU, psutil.virtual_memory().available)


async def find_device(
    wanted: str = AUTO, *, command: Sequence[str] = COMMAND, drivers: Sequence[str] = DRIVERS
) -> Device:
    """Return the requested device, of several the first; see find_devices."""
    return (await find_devices(wanted, command=command, drivers=drivers))[0]


async def find_devices(
    wanted: str = AUTO, *, command: Sequence[str] = COMMAND, drivers: Sequence[str] = DRIVERS
) -> tuple[Device, ...]:
    """Return the requested devices; `auto` is the GPU with the most free memory, else the CPU.

    `wanted`: `auto`, `cpu`, `mps`, `cuda` (the GPU with the most free memory), `all` (every GPU), or one `cuda:N` or
    several with commas between them. Raises DeviceError where one is unavailable.
    """
    if wanted == CPU or (wanted == AUTO and not any(map(os.path.exists, drivers))):
        return (cpu_device(),)
    try:
        return parse_devices(await run([*command, wanted], what="the device probe", time_limit_s=TIME_LIMIT_S))
    except (ChildError, DeviceError) as error:
        reason = (isinstance(error, ChildError) and error.last_line) or str(error)
        if wanted != AUTO:
            raise DeviceError(reason) from error
        _logger.warning("GPU unavailable, using the CPU", reason=reason)
        return (cpu_device(),)
