"""`metaswarm model import` of GGUF files, with its child processes: a whole model, or one line and no package."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from node.cli import run
from node.models import sources
from tests.unit.models.checkpoints import write_checkpoint
from tests.unit.models.gguf_files import metadata, tensors, write_gguf, write_split

check_tensors = sources.check_tensors


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(sources, "check_tensors", check_tensors)
    monkeypatch.setenv("METASWARM_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_split_model_with_rope_scaling_keeps_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = {**tensors(), "rope_freqs.weight": np.array([1.0, 8.0, 8.0, 8.0], np.float32)}
    parts = write_split(tmp_path / "parts", weights=weights)
    assert run(["model", "import", str(parts[1]), "--json"]) == 0
    package = json.loads(capsys.readouterr().out)
    manifest: Any = json.loads((Path(package["path"]) / "manifest.json").read_bytes())
    rope = manifest["config"]["rope_parameters"]
    assert (rope["rope_type"], rope["factor"]) == ("llama3", 8.0)
    assert package["blocks"] == 2


@pytest.mark.parametrize("fault", ["a part", "blocks"])
def test_a_model_that_is_not_whole_leaves_no_package(
    tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str], fault: str
) -> None:
    if fault == "a part":
        first, second = write_split(tmp_path / "parts")
        second.unlink()
        line = "is part 1 of 2 (split.count = 2), and tiny-00002-of-00002.gguf is not beside it"
    else:
        weights = {name: it for name, it in tensors().items() if "blk.1" not in name and "output" not in name}
        first = write_gguf(tmp_path / "tiny.gguf", metadata(), weights)
        line = (
            "lacks tensors of blocks 0-1 (blk.0.attn_output.weight, …), output_norm.weight: it is not the whole model"
        )
    assert run(["model", "import", str(first)]) == 1
    errors = capsys.readouterr().err
    assert line in errors
    assert not list(cache.rglob("manifest.json"))


def test_a_folder_that_does_not_fit_its_architecture_is_refused(
    tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_checkpoint(tmp_path / "model", config={"num_attention_heads": 2, "intermediate_size": 16})
    assert run(["model", "import", str(folder)]) == 1
    assert "cannot be imported: it lacks tensors of blocks 0-2 (model.layers.0.mlp.down_proj.weight" in (
        capsys.readouterr().err
    )
    assert not list(cache.rglob("manifest.json"))
