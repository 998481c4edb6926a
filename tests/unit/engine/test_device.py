"""What a node computes on: what was asked for, or a GPU if there is one, or the CPU."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch

from node.engine import device_probe
from node.engine.device import CPU, Device, DeviceError, find_device, parse_devices
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
    assert await find_device("auto", command=answering(json.dumps([gpu.to_json()])), drivers=["/"]) == gpu


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ("auto", ["cuda:1"]),
        ("cuda", ["cuda:1"]),
        ("cuda:0", ["cuda:0"]),
        ("all", ["cuda:0", "cuda:1", "cuda:2"]),
        ("cuda:2,cuda:0", ["cuda:2", "cuda:0"]),
    ],
)
def test_probe_finds_the_gpus_that_are_asked_for(
    wanted: str, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    free = {"cuda:0": 10 << 30, "cuda:1": 70 << 30, "cuda:2": 30 << 30}
    monkeypatch.setattr(device_probe, "accelerators", lambda: [(H100, torch.device(name)) for name in free])
    monkeypatch.setattr(device_probe, "free_bytes", lambda device: free[str(device)])
    monkeypatch.setattr(device_probe, "_add_on", lambda _device: None)
    devices = device_probe.probe(wanted)
    assert [device.name for device in devices] == expected
    assert [device.free_bytes for device in devices] == [free[name] for name in expected]
    assert parse_devices(json.dumps([device.to_json() for device in devices])) == tuple(devices)


def test_gpu_that_is_broken_or_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_device: torch.device) -> None:
        raise RuntimeError("no kernel image is available")

    monkeypatch.setattr(device_probe, "accelerators", lambda: [(H100, torch.device("cuda:0"))])
    monkeypatch.setattr(device_probe, "_add_on", fail)
    with pytest.raises(DeviceError, match=r"cuda:0: no kernel image is available; there is no cuda:5 device"):
        device_probe.probe("cuda:0,cuda:5")
    with pytest.raises(DeviceError, match="no kernel image"):
        device_probe.probe("all")
    monkeypatch.setattr(device_probe, "accelerators", list)
    with pytest.raises(DeviceError, match="there is no GPU device"):
        device_probe.probe("all")
    assert [device.name for device in device_probe.probe("auto")] == [CPU]


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
