"""`metaswarm model import` of GGUF files, with its child processes: a whole model, or one line and no package."""

import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from node.cli import run
from node.models import sources
from node.models.gguf_file import read_gguf
from tests.unit.models.checkpoints import write_checkpoint
from tests.unit.models.gguf_files import VOCABULARY, metadata, tensors, without, write_gguf, write_split

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
    assert (package["format"], package["granularity"], package["blocks"]) == ("gguf", 1, 2)
    tokenizer = Tokenizer.from_file(f"{package['path']}/tokenizer.json")
    assert tokenizer.encode("ab").ids == [VOCABULARY.index("ab")]
    common = read_gguf(Path(package["path"]) / "common.gguf")
    assert common.tensors.keys() == {"rope_freqs.weight"}
    assert run(["model", "show", package["id"][:8]]) == 0
    shown = capsys.readouterr().out
    assert "weights       gguf, mostly F32" in shown
    assert "may be cut    anywhere" in shown


@pytest.mark.parametrize("fault", ["a part", "blocks", "a tensor of a block", "an unknown architecture"])
def test_a_model_that_is_not_whole_leaves_no_package(
    tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str], fault: str
) -> None:
    if fault == "a part":
        first, second = write_split(tmp_path / "parts")
        second.unlink()
        line = "is part 1 of 2 (split.count = 2), and tiny-00002-of-00002.gguf is not beside it"
    elif fault == "a tensor of a block":
        first = write_gguf(tmp_path / "tiny.gguf", metadata(), without(tensors(), ["blk.1.ffn_up"]))
        line = (
            "cannot import tiny.gguf: llama.cpp cannot load the model: check_tensor_dims: tensor 'blk.1.ffn_up.weight'"
        )
    elif fault == "an unknown architecture":
        first = write_gguf(tmp_path / "tiny.gguf", metadata("plamo9000"))
        line = "cannot import tiny.gguf: llama.cpp cannot load the model: unknown model architecture: 'plamo9000'"
    else:
        weights = {name: it for name, it in tensors().items() if "blk.1" not in name and "output" not in name}
        first = write_gguf(tmp_path / "tiny.gguf", metadata(), weights)
        line = "tiny.gguf lacks tensors of block 1 (blk.1.*, …): it is not the whole model"
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
