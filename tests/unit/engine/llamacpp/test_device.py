"""A span is computed on the device for which its memory was planned."""

from pathlib import Path
from typing import Any

import pytest

from node.engine.interface import EngineOptions
from node.engine.llamacpp import library
from node.engine.llamacpp.shard import LLAMACPP, LlamaShard
from protocol.identity import BlockRange
from tests.unit.engine.llamacpp.architectures import ARCHITECTURES, write_model
from tests.unit.engine.llamacpp.packages import write_package


@pytest.mark.parametrize(
    ("device", "has_gpu", "expected"),
    [
        ("cpu", False, (-1, 0, 60)),
        ("cpu", True, (-1, 0, 60)),
        ("cuda:2", False, (-1, 0, 60)),
        ("cuda:2", True, (2, -1, 512)),
        ("mps", True, (0, -1, 512)),
    ],
)
def test_span_is_on_its_device_only(
    device: str, has_gpu: bool, expected: tuple[int, int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a library that says that it has GPUs, asked for the device; it is then given a CPU."""
    functions, asked = library.load_library(), list[Any]()
    load, init = functions.llama_model_load_from_file, functions.llama_init_from_model

    def load_here(path: bytes, parameters: Any) -> Any:
        asked.extend([parameters.split_mode, parameters.main_gpu, parameters.n_gpu_layers])
        parameters.main_gpu = -1
        return load(path, parameters)

    def init_here(model: Any, parameters: Any) -> Any:
        asked.append(parameters.n_ubatch)
        return init(model, parameters)

    monkeypatch.setattr(functions, "llama_supports_gpu_offload", lambda: has_gpu)
    monkeypatch.setattr(functions, "llama_model_load_from_file", load_here)
    monkeypatch.setattr(functions, "llama_init_from_model", init_here)
    files = write_package(write_model(ARCHITECTURES["llama3"], tmp_path / "model.gguf"), tmp_path / "package")
    blocks = BlockRange(0, 4)
    shard = LlamaShard(files.source(blocks), blocks, EngineOptions(threads=1, kv_positions=256, device=device))
    assert tuple(asked) == (library.SPLIT_NONE, *expected)
    assert LLAMACPP in shard.variants()
