"""What an engine computes on, and how much of its memory is free: `python -m node.engine.device NAME` prints it.

A process of its own, because only engines may import torch, and because drivers crash. Where no driver of a GPU is to
be seen it is not even started: what remains is the CPU.
"""

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import psutil
import structlog

from node.util.child_process import ChildError, python, run
from protocol.capabilities import Accelerator
from protocol.errors import RemoteProtocolError
from protocol.schema import from_map, to_map

if TYPE_CHECKING:
    import torch

AUTO: Final = "auto"
CPU: Final = "cpu"
TIME_LIMIT_S: Final = 60.0
"""torch is imported within seconds; a machine that swaps, or has many GPUs to wake, takes longer."""

COMMAND: Final = python("-m", "node.engine.device")
DRIVERS: Final = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")
"""Files that are there where NVIDIA's driver is, or AMD's, or either inside Windows."""

_logger = structlog.get_logger(__name__)


class DeviceError(Exception):
    """There is no such device here. The message is one line."""


@dataclass(frozen=True, slots=True)
class Device:
    """What an engine computes on.

    `name`: torch's, with a number where there can be several: `cpu`, `cuda:0`, `mps`. `free_bytes`: of its memory, when
    it was looked at. `accelerator`: what it is, without figures; None for the CPU.
    """

    name: str
    free_bytes: int
    accelerator: Accelerator | None = None

    def to_json(self) -> dict[str, Any]:
        """Return it as a document."""
        accelerator = self.accelerator and to_map(self.accelerator)
        return {"name": self.name, "free_bytes": self.free_bytes, "accelerator": accelerator}

    @classmethod
    def parse(cls, document: bytes | str) -> "Device":
        """Return the device in a document. Raises DeviceError."""
        try:
            values = json.loads(document)
            found = values["accelerator"]
            return cls(values["name"], values["free_bytes"], found and from_map(Accelerator, found, "accelerator"))
        except (ValueError, TypeError, KeyError, RemoteProtocolError) as error:
            raise DeviceError(f"what was said of it makes no sense: {error}") from None


async def find_device(
    wanted: str = AUTO, *, command: Sequence[str] = COMMAND, drivers: Sequence[str] = DRIVERS
) -> Device:
    """Return the device that was asked for; `auto` is the GPU with the most free memory, else the CPU.

    `wanted`: `auto`, `cpu`, `cuda`, `cuda:N` or `mps`. Raises DeviceError where there is none such.
    """
    if wanted == CPU or (wanted == AUTO and not any(map(os.path.exists, drivers))):
        return _cpu()
    try:
        return await _ask([*command, wanted])
    except DeviceError as error:
        if wanted != AUTO:
            raise
        _logger.warning("no GPU is used", reason=str(error))
        return _cpu()


async def _ask(command: Sequence[str]) -> Device:
    """Have another process look. Raises DeviceError."""
    try:
        return Device.parse(await run(command, what="its process", time_limit_s=TIME_LIMIT_S))
    except ChildError as error:
        raise DeviceError(error.last_line or f"the device cannot be looked for: {error}") from None


def free_bytes(device: "torch.device") -> int:
    """Return how much of a device's memory is free."""
    import torch

    main_bytes = int(psutil.virtual_memory().available)
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if device.type == "mps":  # which shares the main memory
        return min(main_bytes, int(torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()))
    return main_bytes


def synchronize(device: "torch.device") -> None:
    """Wait until a device has done what it was told to; the CPU has."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def is_lost(cause: BaseException | None) -> bool:
    """Whether an error says that a GPU has failed: to this process it stays lost, to the next one perhaps not."""
    import torch

    lost = getattr(torch, "AcceleratorError", None)  # since torch 2.8
    return lost is not None and isinstance(cause, lost)


def look(wanted: str) -> Device:
    """Find a device by asking torch, and have it add something up. Raises DeviceError."""
    import torch

    from node.engine.throughput import accelerators

    kind, _, number = wanted.partition(":")
    names = [wanted] if number or kind == "mps" else [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    found, faults = [], []
    for accelerator, device in accelerators():
        if str(device) in names:
            try:
                torch.ones(8, device=device).sum().item()
                found.append(Device(str(device), free_bytes(device), accelerator))
            except RuntimeError as error:  # of another architecture than torch was built for, broken, taken, full
                faults.append(f"{device}: {' '.join(str(error).split())[:200]}")
    if not found and (faults or wanted != AUTO):
        raise DeviceError("; ".join(faults) or f"there is no {wanted} device for torch {torch.__version__} here")
    return max(found, key=lambda each: each.free_bytes, default=_cpu())


def _cpu() -> Device:
    return Device(CPU, psutil.virtual_memory().available)


def main() -> int:
    """Print the device whose name is the first argument as JSON; return the exit code."""
    try:
        device = look(sys.argv[1])
    except (DeviceError, RuntimeError) as error:  # torch's complaints of drivers are RuntimeErrors
        sys.stderr.write(" ".join(str(error).split())[:300] + "\n")
        return 1
    sys.stdout.write(json.dumps(device.to_json()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
