"""What an engine computes on, and how much of its memory is free: `python -m node.engine.devices NAME` prints it.

A process of its own, because only engines may import torch, and because drivers crash. Where no driver of a GPU is to
be seen it is not even started: what remains is the CPU.
"""

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Final

import psutil
import structlog
import trio

if TYPE_CHECKING:
    import torch

AUTO: Final = "auto"
CPU: Final = "cpu"
TIME_LIMIT_S: Final = 60.0
"""torch is imported within seconds; a machine that swaps, or has many GPUs to wake, takes longer."""

COMMAND: Final = (sys.executable, "-P", "-m", "node.engine.devices")
DRIVERS: Final = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")
"""Files that are there where NVIDIA's driver is, or AMD's, or either inside Windows."""

_logger = structlog.get_logger(__name__)


class DeviceError(Exception):
    """There is no such device here. The message is one line."""


@dataclass(frozen=True, slots=True)
class Device:
    """What an engine computes on. `name`: torch's, with a number where there can be several: `cpu`, `cuda:0`, `mps`."""

    name: str
    free_bytes: int
    """Of its memory, when it was looked at."""


async def find_device(
    wanted: str = AUTO, *, command: Sequence[str] = COMMAND, drivers: Sequence[str] = DRIVERS
) -> Device:
    """Return the device that was asked for; `auto` is the GPU with the most free memory, else the CPU.

    `wanted`: `auto`, `cpu`, `cuda`, `cuda:N` or `mps`. Raises DeviceError where there is none such.
    """
    if wanted == CPU or (wanted == AUTO and not any(map(os.path.exists, drivers))):
        return Device(CPU, psutil.virtual_memory().available)
    try:
        return await _ask([*command, wanted])
    except DeviceError as error:
        if wanted != AUTO:
            raise
        _logger.warning("no GPU is used", reason=str(error))
        return Device(CPU, psutil.virtual_memory().available)


async def _ask(command: Sequence[str]) -> Device:
    """Have another process look. Raises DeviceError."""
    with trio.move_on_after(TIME_LIMIT_S):
        try:
            done = await trio.run_process(command, capture_stdout=True, capture_stderr=True, check=False)
        except OSError as error:
            raise DeviceError(f"the device cannot be looked for: {error}") from None
        said = done.stderr.decode(errors="replace").split("\n")
        if done.returncode != 0:
            raise DeviceError(next((line for line in reversed(said) if line.strip()), "torch died of it")[:300])
        return Device(**json.loads(done.stdout))
    raise DeviceError(f"torch did not find it within {TIME_LIMIT_S:g} s")


def free_bytes(device: "torch.device") -> int:
    """Return how much of a device's memory is free."""
    import torch

    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if device.type == "mps":
        return int(torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory())
    return int(psutil.virtual_memory().available)


def look(wanted: str) -> Device:
    """Find a device by asking torch. Raises DeviceError."""
    import torch

    kind, _, number = wanted.partition(":")
    if kind == "mps":
        if not torch.backends.mps.is_available():
            raise DeviceError(f"there is no mps device for torch {torch.__version__} on this machine")
        return Device("mps", free_bytes(torch.device("mps")))
    found = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    if number:
        found = found[int(number) : int(number) + 1]
    if not found and wanted != AUTO:
        raise DeviceError(f"there is no {wanted} device for torch {torch.__version__} on this machine")
    devices = [Device(str(device), free_bytes(device)) for device in found]
    return max(devices, key=lambda each: each.free_bytes, default=Device(CPU, psutil.virtual_memory().available))


def main() -> int:
    """Print the device whose name is the first argument as JSON; return the exit code."""
    try:
        device = look(sys.argv[1])
    except (DeviceError, RuntimeError) as error:  # torch's complaints of drivers are RuntimeErrors
        sys.stderr.write(" ".join(str(error).split())[:300] + "\n")
        return 1
    sys.stdout.write(json.dumps(asdict(device)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
