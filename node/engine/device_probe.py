"""Finds devices through torch: `python -m node.engine.device_probe NAME` prints those with this name as JSON.

A process of its own, because only engines may import torch, and because drivers crash.
"""

import json
import sys
from collections.abc import Iterator, Sequence

import psutil
import torch

from node.engine.device import ALL, AUTO, Device, DeviceError, cpu_device
from node.util.text import one_line
from protocol.capabilities import Accelerator, AcceleratorKind


def accelerators() -> Iterator[tuple[Accelerator, torch.device]]:
    """Yield every accelerator that torch can use, without figures, and torch's name of it."""
    if torch.cuda.is_available():  # ROCm answers to the same name
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            if torch.version.hip is not None:
                kind, capability = AcceleratorKind.ROCM, properties.gcnArchName.partition(":")[0]
            else:
                kind, capability = AcceleratorKind.CUDA, f"{properties.major}.{properties.minor}"
            accelerator = Accelerator(
                kind=kind, name=properties.name, memory_bytes=properties.total_memory, compute_capability=capability
            )
            yield accelerator, torch.device("cuda", index)
    if torch.backends.mps.is_available():
        size = torch.mps.recommended_max_memory()
        mps = Accelerator(kind=AcceleratorKind.MPS, name=torch.backends.mps.get_name(), memory_bytes=size)
        yield mps, torch.device("mps")


def free_bytes(device: torch.device) -> int:
    """Return how much of a device's memory is free."""
    main_bytes = int(psutil.virtual_memory().available)
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if device.type == "mps":  # which shares the main memory
        return min(main_bytes, int(torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()))
    return main_bytes


def synchronize(device: torch.device) -> None:
    """Wait until a device has completed the operations launched on it; the CPU always has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def empty_cache(device: torch.device) -> None:
    """Give memory of a device back that torch keeps for later tensors."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()


def is_lost(cause: BaseException | None) -> bool:
    """Return whether an error means that a GPU has failed: lost to this process, perhaps not to the next one."""
    lost = getattr(torch, "AcceleratorError", None)  # since torch 2.8
    return lost is not None and isinstance(cause, lost)


def probe(wanted: str) -> Sequence[Device]:
    """Find devices and run an addition on each; see node.engine.device.find_devices. Raises DeviceError."""
    found: dict[str, Device] = {}
    faults: dict[str, str] = {}
    names = [name for name in wanted.split(",") if ":" in name or name == "mps"]
    for accelerator, device in accelerators():
        name = str(device)
        if name in names or (not names and device.type == "cuda"):
            try:
                _add_on(device)
                found[name] = Device(name, free_bytes(device), accelerator)
            except RuntimeError as error:  # of another architecture than torch was built for, broken, taken, full
                faults[name] = f"{name}: {one_line(error, 200)}"
    missing = [faults.get(name) or _absent(name) for name in names if name not in found]
    if missing or not (found or (wanted == AUTO and not faults)):
        raise DeviceError("; ".join(missing or faults.values()) or _absent("GPU" if wanted == ALL else wanted))
    if names:
        return [found[name] for name in names]
    freest = sorted(found.values(), key=lambda each: -each.free_bytes)
    return list(found.values()) if wanted == ALL else freest[:1] or [cpu_device()]


def _add_on(device: torch.device) -> None:
    torch.ones(8, device=device).sum().item()


def _absent(name: str) -> str:
    return f"there is no {name} device for torch {torch.__version__} here"


def main() -> int:
    """Print the devices that the first argument asks for as JSON; return the exit code."""
    try:
        devices = probe(sys.argv[1])
    except (DeviceError, RuntimeError) as error:  # torch's complaints of drivers are RuntimeErrors
        sys.stderr.write(one_line(error) + "\n")
        return 1
    sys.stdout.write(json.dumps([device.to_json() for device in devices]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
