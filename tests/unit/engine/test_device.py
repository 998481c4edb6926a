"""What a node computes on: what was asked for, or a GPU if there is one, or the CPU."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from node.engine.device import CPU, Device, DeviceError, find_device
from protocol.capabilities import Throughput
from tests.support.capabilities import H100


def answering(answer: str, code: int = 0) -> list[str]:
    """Return a command that stands for a torch which sees other devices than this machine has."""
    stream = "stderr" if code else "stdout"
    return [sys.executable, "-c", f"import sys; sys.{stream}.write({answer!r}); sys.exit({code})"]


async def test_auto_device_without_driver_is_the_cpu_without_torch(tmp_path: Path) -> None:
    missing = str(tmp_path / "nvidia")
    found = await find_device("auto", command=["/no/such/program"], drivers=[missing])
    assert found.name == CPU
    assert 0 < found.free_bytes <= psutil.virtual_memory().total


async def test_auto_device_prefers_gpu() -> None:
    gpu = Device("cuda:1", 80 << 30, replace(H100, throughput=Throughput()))
    assert await find_device("auto", command=answering(json.dumps(gpu.to_json())), drivers=["/"]) == gpu


async def test_a_driver_without_a_device_leaves_the_cpu() -> None:
    assert (await find_device("auto", command=answering("driver too old", 1), drivers=["/"])).name == CPU


async def test_unavailable_requested_device_is_an_error() -> None:
    with pytest.raises(DeviceError, match="driver too old"):
        await find_device("cuda", command=answering("warning\ndriver too old\n", 1))
    with pytest.raises(DeviceError, match="malformed answer from the device probe"):
        await find_device("cuda", command=answering("driver says hello {}"))
    with pytest.raises(DeviceError, match="the device probe cannot be started"):
        await find_device("cuda", command=["/no/such/program"])
    with pytest.raises(DeviceError, match="there is no cuda:99 device for torch"):
        await find_device("cuda:99")
