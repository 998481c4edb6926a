import hashlib
import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from node.models.errors import ManifestError
from node.models.manifest import FileEntry, Json, Manifest, normalise_config, parse_manifest
from protocol.canonical import canonical_json
from protocol.identity import BlockRange


def entry(name: str, size: int = 100) -> FileEntry:
    return FileEntry(name, size, hashlib.sha256(name.encode()).hexdigest())


def manifest(*, blocks: int = 4, tied: bool = True) -> Manifest:
    return Manifest(
        config={
            "model_type": "llama",
            "num_hidden_layers": blocks,
            "hidden_size": 64,
            "vocab_size": 1000,
            "max_position_embeddings": 512,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": tied,
        },
        bos_token_id=1,
        eos_token_ids=(2, 7),
        tokenizer_files=(entry("tokenizer.json"), entry("tokenizer_config.json")),
        embed=entry("embed.safetensors", 1000),
        head=entry("head.safetensors", 10),
        blocks=tuple(entry(f"block-{block:03d}.safetensors", 100 + block) for block in range(blocks)),
    )


def altered(change: Callable[[Any], object]) -> bytes:
    value = json.loads(manifest().data)
    change(value)
    return canonical_json(value)


def test_a_manifest_survives_its_bytes_and_is_named_by_their_hash() -> None:
    original = manifest()
    parsed = parse_manifest(original.data)
    assert parsed == original
    assert parsed.model_id == hashlib.sha256(original.data).hexdigest()
    assert (parsed.block_count, parsed.tied, parsed.model_type) == (4, True, "llama")
    assert (parsed.hidden_size, parsed.vocabulary_size, parsed.max_positions) == (64, 1000, 512)


@pytest.mark.parametrize(
    ("tied", "start", "end", "names"),
    [
        (True, 0, 2, ["embed", "block-000", "block-001"]),
        (True, 1, 3, ["block-001", "block-002"]),
        (True, 3, 4, ["embed", "block-003", "head"]),
        (False, 3, 4, ["block-003", "head"]),
        (True, 0, 4, ["embed", "block-000", "block-001", "block-002", "block-003", "head"]),
    ],
)
def test_a_span_needs_its_blocks_and_the_ends_it_touches(tied: bool, start: int, end: int, names: list[str]) -> None:
    files = manifest(tied=tied).files_for(BlockRange(start, end))
    assert [file.name.removesuffix(".safetensors") for file in files] == names
    assert manifest(tied=tied).bytes_of(BlockRange(start, end)) == sum(file.size_bytes for file in files)


def test_blocks_beyond_the_last_are_refused() -> None:
    with pytest.raises(ManifestError, match="blocks 0-4, not 2-5"):
        manifest().files_for(BlockRange(2, 5))


HOSTILE: dict[str, Callable[[Any], object]] = {
    "path traversal": lambda m: m["embed"].update(name="../../.ssh/authorized_keys"),
    "absolute path": lambda m: m["tokenizer"][0].update(name="/etc/passwd"),
    "a name that is another file's": lambda m: m["head"].update(name="block-000.safetensors"),
    "the manifest's own name": lambda m: m["tokenizer"][0].update(name="manifest.json"),
    "blocks out of order": lambda m: m["blocks"].reverse(),
    "a file twice": lambda m: m["tokenizer"].append(m["tokenizer"][0]),
    "no blocks": lambda m: m["blocks"].clear(),
    "fewer blocks than the config says": lambda m: m["blocks"].pop(),
    "too many blocks": lambda m: m["blocks"].extend(m["blocks"] * 400),
    "a size beyond the limit": lambda m: m["head"].update(size=1 << 40),
    "a negative size": lambda m: m["head"].update(size=-1),
    "an empty file": lambda m: m["head"].update(size=0),
    "a size that is no integer": lambda m: m["head"].update(size=1.5),
    "a boolean for a size": lambda m: m["head"].update(size=True),
    "a tokenizer that fills the memory": lambda m: m["tokenizer"][0].update(size=(64 << 20) + 1),
    "a tokenizer's config that fills the memory": lambda m: m["tokenizer"][1].update(size=(16 << 20) + 1),
    "a chat template that fills the memory": lambda m: m["tokenizer"].insert(
        0, {"name": "chat_template.jinja", "size": (1 << 20) + 1, "sha256": "0" * 64}
    ),
    "a hash in capitals": lambda m: m["head"].update(sha256="A" * 64),
    "a short hash": lambda m: m["head"].update(sha256="a" * 63),
    "an unknown key": lambda m: m.update(code="import os"),
    "an unknown key of a file": lambda m: m["head"].update(url="http://example.com"),
    "a missing key": lambda m: m.pop("generation"),
    "another format": lambda m: m.update(format=2),
    "a boolean for the format": lambda m: m.update(format=True),
    "remote code": lambda m: m["config"].update(auto_map={"AutoModel": "x.Y"}),
    "remote code, nested": lambda m: m["config"].update(text_config={"auto_map": {}}),
    "a config without its kind": lambda m: m["config"].pop("model_type"),
    "a config silent about tying": lambda m: m["config"].pop("tie_word_embeddings"),
    "a huge width": lambda m: m["config"].update(hidden_size=1 << 40),
    "a negative width": lambda m: m["config"].update(hidden_size=-1),
    "a huge integer": lambda m: m["config"].update(seed=1 << 70),
    "a deep config": lambda m: m["config"].update(a=[[[[[[[[[]]]]]]]]]),
    "a token id beyond any vocabulary": lambda m: m["generation"]["eos_token_ids"].append(1 << 40),
    "too many stop tokens": lambda m: m["generation"].update(eos_token_ids=list(range(100))),
}


@pytest.mark.parametrize("change", HOSTILE.values(), ids=HOSTILE)
def test_a_lying_manifest_is_refused(change: Callable[[Any], object]) -> None:
    with pytest.raises(ManifestError):
        parse_manifest(altered(change))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff",
        b"null",
        b"[" * 100_000,
        b"9" * 10_000,
        b'{"format":1',
        manifest().data + b" ",
        manifest().data.replace(b'"model_type":"llama"', b'"model_type":"llama","x":NaN'),
        manifest().data.replace(b'"model_type":"llama"', b'"model_type":"llama","x":1e999'),
        manifest().data.replace(b'"model_type":"llama"', b'"model_type":"llama","x":"\\ud800"'),
        manifest().data.replace(b'"vocab_size":1000', b'"vocab_size":1000,"vocab_size":1000'),
        b" " * (5 << 20),
    ],
)
def test_non_canonical_manifest_is_refused(data: bytes) -> None:
    with pytest.raises(ManifestError):
        parse_manifest(data)


@given(st.data())
def test_no_change_of_bytes_raises_anything_else_or_keeps_the_id(data: st.DataObject) -> None:
    original = manifest().data
    position = data.draw(st.integers(0, len(original) - 1))
    changed = original[:position] + data.draw(st.binary(max_size=3)) + original[position + 1 :]
    try:
        parsed = parse_manifest(changed)
    except ManifestError:
        return
    assert (parsed.model_id == manifest().model_id) == (changed == original)


def test_volatile_keys_are_removed_from_the_config() -> None:
    volatile: dict[str, Json] = {"transformers_version": "5.0", "_name_or_path": "/home/me", "auto_map": {}}
    config: dict[str, Json] = {
        "model_type": "x",
        "torch_dtype": "torch.bfloat16",
        "text_config": {"n": 1, **volatile},
        **volatile,
    }
    assert normalise_config(config) == {"model_type": "x", "dtype": "bfloat16", "text_config": {"n": 1}}
