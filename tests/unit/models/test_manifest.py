import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from node.models.errors import ManifestError
from node.models.manifest import FileEntry, Json, Manifest, normalise_config, parse_manifest
from protocol.canonical import canonical_json
from protocol.identity import BlockRange
from selector.cuts import Cuts


def entry(name: str, size: int = 100) -> FileEntry:
    return FileEntry(name, size, hashlib.sha256(name.encode()).hexdigest())


def gguf_manifest(*, blocks: int = 4, tied: bool = True, granularity: int = 2) -> Manifest:
    return replace(
        manifest(blocks=blocks, tied=tied),
        format="gguf",
        common=entry("common.gguf", 7),
        embed=entry("embed.gguf", 1000),
        head=entry("head.gguf", 10),
        blocks=tuple(entry(f"block-{block:03d}.gguf", 100 + block) for block in range(blocks)),
        granularity=granularity,
    )


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


def altered(change: Callable[[Any], object], original: Manifest | None = None) -> bytes:
    value = json.loads((original or manifest()).data)
    change(value)
    return canonical_json(value)


def test_a_manifest_survives_its_bytes_and_is_named_by_their_hash() -> None:
    original = manifest()
    parsed = parse_manifest(original.data)
    assert parsed == original
    assert parsed.model_id == hashlib.sha256(original.data).hexdigest()
    assert (parsed.block_count, parsed.tied, parsed.model_type) == (4, True, "llama")
    assert (parsed.hidden_size, parsed.vocabulary_size, parsed.max_positions) == (64, 1000, 512)


def test_the_id_of_a_safetensors_package_is_what_it_always_was() -> None:
    assert manifest().model_id == "a5085d016ee7bc512a4273c3df12b42cf54c6efe2055b8ffdfdc496f4ef70cb6"
    assert b"granularity" not in manifest().data
    assert b"common" not in manifest().data


def test_a_manifest_of_gguf_files_survives_its_bytes_and_says_where_it_may_be_cut() -> None:
    original = gguf_manifest()
    parsed = parse_manifest(original.data)
    assert parsed == original
    assert (parsed.format, parsed.granularity, parsed.cuts) == ("gguf", 2, Cuts(4, 2))
    assert json.loads(original.data)["format"] == "gguf"
    assert "granularity" not in json.loads(gguf_manifest(granularity=1).data)


@st.composite
def manifests(draw: st.DrawFn) -> Manifest:
    blocks = draw(st.integers(1, 6))
    files = st.builds(
        FileEntry, st.just(""), st.integers(1, 1 << 20), st.text("0123456789abcdef", min_size=64, max_size=64)
    )
    form = draw(st.sampled_from(("safetensors", "gguf")))

    def named(name: str) -> FileEntry:
        return replace(draw(files), name=f"{name}.{form}")

    return replace(
        manifest(blocks=blocks, tied=draw(st.booleans())),
        format=form,
        bos_token_id=draw(st.none() | st.integers(0, 1 << 20)),
        eos_token_ids=tuple(draw(st.lists(st.integers(0, 1 << 20), max_size=3))),
        tokenizer_files=(),
        common=named("common") if form == "gguf" else None,
        embed=named("embed"),
        head=named("head"),
        blocks=tuple(named(f"block-{block:03d}") for block in range(blocks)),
        granularity=draw(st.integers(1, blocks)),
    )


@given(manifests(), st.data())
def test_every_manifest_survives_its_bytes(original: Manifest, data: st.DataObject) -> None:
    assert parse_manifest(original.data) == original
    other = data.draw(manifests())
    assert (other.model_id == original.model_id) == (other == original)
    start = data.draw(st.integers(0, original.block_count - 1))
    span = BlockRange(start, data.draw(st.integers(start + 1, original.block_count)))
    assert (original.common in original.files_for(span)) == (original.format == "gguf")
    assert set(original.files_for(span)) <= set(original.weight_files)


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
    for original in (manifest(), gguf_manifest()):
        with pytest.raises(ManifestError):
            parse_manifest(altered(change, original))


LYING_ABOUT_FORMAT: dict[str, tuple[Callable[[Any], object], str]] = {
    "an unknown format": (lambda m: m.update(format="pickle"), "format pickle is unknown here; formats 1 and gguf are"),
    "the first format by another name": (lambda m: m.update(format="safetensors"), "format safetensors is unknown"),
    "no format": (lambda m: m.pop("format"), "lacks 'format'"),
    "files of the other format": (lambda m: m.update(format=1), "of safetensors files has 'common'"),
    "no common file": (lambda m: m.pop("common"), "of gguf files lacks 'common'"),
    "another common file": (lambda m: m["common"].update(name="embed.gguf"), "where common.gguf is expected"),
    "a block of the other format": (
        lambda m: m["blocks"][0].update(name="block-000.safetensors"),
        "where block-000.gguf is expected",
    ),
    "granularity of nothing": (lambda m: m.update(granularity=0), "granularity"),
    "negative granularity": (lambda m: m.update(granularity=-2), "granularity"),
    "granularity beyond the model": (lambda m: m.update(granularity=5), "granularity 5 exceeds the 4 blocks"),
    "huge granularity": (lambda m: m.update(granularity=1 << 60), "granularity"),
    "granularity that is no integer": (lambda m: m.update(granularity=2.0), "granularity"),
    "a boolean for the granularity": (lambda m: m.update(granularity=True), "granularity"),
    "granularity of one in words": (lambda m: m.update(granularity=1), "left out at this value"),
}


@pytest.mark.parametrize(("change", "line"), LYING_ABOUT_FORMAT.values(), ids=LYING_ABOUT_FORMAT)
def test_a_manifest_that_lies_about_its_format_is_refused(change: Callable[[Any], object], line: str) -> None:
    with pytest.raises(ManifestError, match=line) as error:
        parse_manifest(altered(change, gguf_manifest()))
    assert "\n" not in str(error.value)


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
