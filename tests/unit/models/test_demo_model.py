"""The catalogue's demo model as it really is.

The first of these tests on a machine downloads and imports it into the user's cache folder, which takes about a minute;
all later ones, and `metaswarm demo`, find it there.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from node.models.catalogue import CATALOGUE, DEMO_MODEL
from node.models.importer import import_model
from node.models.store import ModelStore, Package
from node.models.tokenizer_worker import Tokenizer
from protocol.identity import BlockRange
from tests.support.demo_model import dequantised_demo_model
from tests.support.tokenizers import load_tokenizer
from tests.unit.models.test_streaming import streamed

GOLDEN: Any = json.loads((Path(__file__).parent / "smollm2_tokens.json").read_text())
"""What transformers' tokenizer, loaded from the GGUF file itself, says to texts and conversations of many kinds."""


@pytest.fixture(scope="module")
def package() -> Package:
    return import_model(DEMO_MODEL, ModelStore())


@pytest.fixture(scope="module")
def tokenizer(package: Package) -> Tokenizer:
    return load_tokenizer(package)


def test_the_catalogue_import_gives_the_pinned_and_complete_model(package: Package) -> None:
    manifest = package.manifest
    assert package.model_id == CATALOGUE[DEMO_MODEL].model_id
    assert package.missing() == ()
    assert (manifest.block_count, manifest.hidden_size, manifest.vocabulary_size) == (30, 576, 49152)
    assert manifest.tied
    assert manifest.max_positions == 8192
    assert len(manifest.data) < 16 << 10
    assert manifest.embed in manifest.files_for(BlockRange(29, 30)), "tied embeddings are paid at both ends"


def test_dequantised_package_is_a_whole_model_in_fp32() -> None:
    manifest = dequantised_demo_model().manifest
    assert (manifest.format, manifest.config["dtype"]) == ("safetensors", "float32")
    # A block is 3.5 million float32 numbers.
    assert manifest.bytes_of(BlockRange(10, 20)) == pytest.approx(10 * 14.2e6, rel=0.01)
    assert manifest.bytes_of(BlockRange(0, 1)) > 113e6


@pytest.mark.parametrize("case", GOLDEN["texts"], ids=range(len(GOLDEN["texts"])))
def test_texts_become_the_tokens_that_transformers_makes_of_them(tokenizer: Tokenizer, case: Any) -> None:
    assert tokenizer.encode(case["text"]) == case["ids"]
    assert tokenizer.decode(case["ids"]) == case["decoded"]
    assert "".join(streamed(tokenizer, case["ids"])) == case["decoded"]


@pytest.mark.parametrize("case", GOLDEN["chats"], ids=range(len(GOLDEN["chats"])))
def test_chat_tokens_equal_those_of_transformers(tokenizer: Tokenizer, case: Any) -> None:
    text = tokenizer.render_chat_text(case["messages"])
    assert text == case["text"]
    assert tokenizer.encode(text, add_special_tokens=False) == case["ids"]


def test_the_end_of_a_turn_ends_the_text(tokenizer: Tokenizer) -> None:
    assert tokenizer.stop_tokens == (2,)
    assert tokenizer.encode("<|im_end|>") == [2]


def test_dequantised_package_has_the_same_tokenizer_and_shape(package: Package) -> None:
    dequantised = dequantised_demo_model()
    assert (package.manifest.format, package.manifest.granularity) == ("gguf", 1)
    assert package.manifest.size_bytes < 102e6, "the weights as they are, and the tokenizer"
    assert package.manifest.has_tokens_of(dequantised.manifest)
    assert package.manifest.max_positions == dequantised.manifest.max_positions
    assert (package.manifest.bos_token_id, package.manifest.eos_token_ids) == (1, (2,))
    for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size"):
        assert package.manifest.config[key] == dequantised.manifest.config[key]
    assert (package.path / "chat_template.jinja").read_bytes() == (
        dequantised.path / "chat_template.jinja"
    ).read_bytes()
