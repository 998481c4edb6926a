"""A checkpoint is compared with its architecture by names and shapes; a span is never loaded with what no file had."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from node.engine.interface import EngineError
from node.engine.loading import check_weights, load_span
from protocol.identity import BlockRange
from tests.unit.engine.tiny_models import BLOCKS, FAMILIES, tiny_model

Shapes = dict[str, tuple[torch.dtype, tuple[int, ...]]]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Shapes]:
    """Return the names, types and shapes that transformers saves for a family."""

    def shapes(family: str) -> Shapes:
        model = tiny_model(family, tmp_path_factory.mktemp("model"))
        saved = load_file(model.folder / "model.safetensors")
        return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in saved.items()}

    return shapes


@pytest.mark.parametrize("family", ["llama", "llama, tied", "mixtral", "gpt2", "gemma3", "deepseek_v3", "bloom"])
def test_what_transformers_saves_is_accepted(checkpoints: Callable[[str], Shapes], family: str) -> None:
    check_weights(FAMILIES[family], checkpoints(family))


@pytest.mark.parametrize(
    ("family", "lacking", "line"),
    [
        ("llama", "model.layers.2.mlp.up_proj", r"lacks tensors of block 2 \(model.layers.2.mlp.up_proj.weight"),
        ("llama", "model.norm", "lacks model.norm.weight"),
        ("llama", "lm_head", "lacks lm_head.weight"),
        ("llama, tied", "model.embed_tokens", "lacks .*model.embed_tokens.weight"),
        (
            "deepseek_v3",
            "model.layers.2.mlp.gate.e_score_correction_bias",
            r"lacks tensors of block 2 \(.*e_score_corr",
        ),
    ],
)
def test_a_tensor_that_is_missing_is_named(
    checkpoints: Callable[[str], Shapes], family: str, lacking: str, line: str
) -> None:
    kept = {name: it for name, it in checkpoints(family).items() if not name.startswith(lacking)}
    with pytest.raises(EngineError, match=line):
        check_weights(FAMILIES[family], kept)


def test_experts_that_are_not_all_there_are_refused(checkpoints: Callable[[str], Shapes]) -> None:
    whole = checkpoints("mixtral")
    one = next(name for name in whole if "experts.2." in name)
    with pytest.raises(EngineError, match=r"do not fit the model's config|lacks"):
        check_weights(FAMILIES["mixtral"], {name: it for name, it in whole.items() if name != one})


def test_a_tensor_without_a_place_or_of_another_shape_is_refused(checkpoints: Callable[[str], Shapes]) -> None:
    whole = checkpoints("llama")
    more: Shapes = {**whole, "model.layers.1.self_attn.q_proj.bias": (torch.float32, (32,))}
    with pytest.raises(EngineError, match=r"has tensors of block 1 \(.*q_proj.bias.*architecture does not use"):
        check_weights(FAMILIES["llama"], more)
    other: Shapes = {**whole, "model.norm.weight": (torch.float32, (31,))}
    with pytest.raises(EngineError, match=r"model.norm.weight has shape \[31\], not \[32\]"):
        check_weights(FAMILIES["llama"], other)


def test_a_span_whose_files_lack_a_stored_buffer_is_not_loaded(tmp_path: Path) -> None:
    model: Any = tiny_model("deepseek_v3", tmp_path)
    span = BlockRange(1, 3)
    load_span(model.source(span), span, torch.float32)
    path = tmp_path / "2.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.2.mlp.gate.e_score_correction_bias"]
    save_file(tensors, path)
    with pytest.raises(EngineError, match=r"files lack model.layers.2.mlp.gate.e_score_correction_bias"):
        load_span(model.source(span), span, torch.float32)
    first = BlockRange(0, 2)
    load_span(model.source(first), first, torch.float32)
    assert span.end < BLOCKS
