"""Imports from a hub: the hub's own library against a server with its routes."""

import errno
import json
import os
import re
import subprocess
import sys
import tracemalloc
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from node.models import http_file
from node.models.errors import ModelError, SourceError
from node.models.hub import HubId, parse_hub_id
from node.models.importer import import_model
from node.models.parts import Selection
from node.models.store import ModelStore
from protocol.identity import BlockRange
from tests.support.hub_server import Fault, HubServer, break_after, login_page, status, without_ranges
from tests.unit.models.checkpoints import llama_tensors, write_checkpoint

REPOSITORY = "Somebody/Tiny"
MATRIX_BYTES = 64 * 64 * 4
BLOCK_BYTES = 4 * MATRIX_BYTES
EMBEDDING_BYTES = 16 * MATRIX_BYTES
HEADER_BYTES = 16_384
"""More than the header of any shard here has."""


@pytest.fixture
def store(tmp_path: Path) -> ModelStore:
    return ModelStore(tmp_path / "cache")


def model_tensors(blocks: int = 6, *, tied: bool = False) -> dict[str, np.ndarray]:
    """Return a model's tensors: blocks of 64 KiB, an embedding of 256 KiB, and a head of the same if it is not tied."""
    rng = np.random.default_rng(1)
    tensors = {"model.embed_tokens.weight": rng.normal(size=(1024, 64)).astype(np.float32)}
    for block in range(blocks):
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            weight = rng.normal(size=(64, 64)).astype(np.float32)
            tensors[f"model.layers.{block}.self_attn.{name}.weight"] = weight
    tensors["model.norm.weight"] = rng.normal(size=64).astype(np.float32)
    if not tied:
        tensors["lm_head.weight"] = rng.normal(size=(1024, 64)).astype(np.float32)
    return tensors


def publish(
    hub: HubServer, tensors: Any = None, *, shards: int = 2, repository: str = REPOSITORY, **config: Any
) -> Path:
    """Put a checkpoint into the hub, by default of 6 blocks, and files beside it that no import reads."""
    tensors = model_tensors() if tensors is None else tensors
    config = {
        "num_hidden_layers": sum(".q_proj." in name for name in tensors),
        "hidden_size": 64,
        "tie_word_embeddings": False,
    } | config
    folder = hub.folder / repository
    write_checkpoint(folder, tensors, shards=shards, config=config)
    (folder / "pytorch_model.bin").write_bytes(b"a pickle")
    (folder / "consolidated.safetensors").write_bytes(b"the same in another format")
    (folder / "tiny-Q4_K_M.gguf").write_bytes(b"GGUF")
    (folder / "onnx").mkdir()
    (folder / "onnx" / "model.onnx").write_bytes(b"onnx")
    return folder


def sent_weights(hub: HubServer) -> int:
    """Return how many bytes of weights the hub has sent."""
    return sum(count for name, count in hub.sent.items() if name.startswith("model-"))


def size_of_weights(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("model-*"))


def test_streams_package_from_hub_and_reads_only_wanted_files(
    hub: HubServer, store: ModelStore, tmp_path: Path
) -> None:
    folder = publish(hub)
    reports: list[tuple[int, int]] = []
    package = import_model(
        f"{REPOSITORY}@v1", store, progress=lambda stage, *n: reports.append(n) if "download" in stage else None
    )
    assert package.model_id == import_model(str(folder), ModelStore(tmp_path / "other")).model_id
    assert store.verify(package.model_id).corrupt == ()
    assert not package.missing()
    assert reports[-1][0] == reports[-1][1] > 0
    assert store.resolve("tiny") == package.model_id
    asked = " ".join(hub.requests)
    assert not any(name in asked for name in (".bin", "consolidated", ".gguf", "onnx"))
    # Every byte once, and the hub's library keeps no copy of it.
    assert sent_weights(hub) == size_of_weights(folder)
    assert not (tmp_path / "hub-cache").exists()
    # Over few connections, and with few requests: tensors that follow each other are read as one range.
    assert hub.connections < 6
    assert len(hub.content("model-")) < 8 + 2 * 8 + 4


def test_repeated_import_of_same_commit_reads_nothing(hub: HubServer, store: ModelStore) -> None:
    publish(hub)
    package = import_model(REPOSITORY, store)
    hub.requests.clear()
    assert import_model(f"{REPOSITORY}@main", store) == package
    assert hub.requests == [f"GET /api/models/{REPOSITORY}/revision/main"]


def test_takes_files_from_cache_of_hub_library(hub: HubServer, store: ModelStore) -> None:
    import huggingface_hub

    publish(hub)
    huggingface_hub.snapshot_download(REPOSITORY, allow_patterns=["model-00001*"])
    hub.sent.clear()
    package = import_model(REPOSITORY, store)
    assert store.verify(package.model_id).corrupt == ()
    assert hub.sent["model-00001-of-00002.safetensors"] == 0


@pytest.mark.parametrize("tied", [False, True])
def test_reads_only_ranges_of_blocks_with_manifest_at_hand(
    hub: HubServer, store: ModelStore, tmp_path: Path, tied: bool
) -> None:
    folder = publish(hub, model_tensors(30, tied=tied), tie_word_embeddings=tied)
    whole = import_model(str(folder), ModelStore(tmp_path / "other"))
    notes: list[str] = []
    wanted = Selection(blocks=BlockRange(0, 10), manifest=whole.manifest, note=notes.append)
    package = import_model(REPOSITORY, store, wanted=wanted)
    assert package.model_id == whole.model_id
    assert package.present() == {"embed.safetensors", *(f"block-{block:03d}.safetensors" for block in range(10))}
    assert store.verify(package.model_id, BlockRange(0, 10)).corrupt == ()
    assert notes == []
    # A third of the blocks and the embedding.
    needed = 10 * BLOCK_BYTES + EMBEDDING_BYTES
    assert needed < sent_weights(hub) < needed + 2 * HEADER_BYTES
    # The last span needs the head, and the embedding where it is the head's matrix. What is there is not read again.
    hub.sent.clear()
    package = import_model(REPOSITORY, store, wanted=Selection(blocks=BlockRange(20, 30)))
    assert package.missing(BlockRange(20, 30)) == ()
    assert len(package.missing()) == 10
    assert sent_weights(hub) < 10 * BLOCK_BYTES + (0 if tied else EMBEDDING_BYTES) + 2 * HEADER_BYTES


def test_hashes_rest_without_keeping_it_when_manifest_is_unknown(
    hub: HubServer, store: ModelStore, tmp_path: Path
) -> None:
    folder = publish(hub)
    notes: list[str] = []
    package = import_model(REPOSITORY, store, wanted=Selection(blocks=BlockRange(2, 4), note=notes.append))
    assert package.model_id == import_model(str(folder), ModelStore(tmp_path / "other")).model_id
    assert package.present() == {"block-002.safetensors", "block-003.safetensors"}
    assert len(notes) == 1
    assert re.search(r"0\.9 MB are read once, and blocks 2-4 kept \(0\.1 MB\)", notes[0])
    # Now the manifest is known: further blocks are read by ranges.
    hub.sent.clear()
    package = import_model(REPOSITORY, store, wanted=Selection(blocks=BlockRange(4, 5), note=notes.append))
    assert package.present() == {f"block-{block:03d}.safetensors" for block in (2, 3, 4)}
    assert len(notes) == 1
    assert sent_weights(hub) < BLOCK_BYTES + 2 * HEADER_BYTES
    # And all of it completes the package.
    assert not import_model(REPOSITORY, store).missing()


def test_manifest_of_another_model_is_refused_before_its_weights_are_read(
    hub: HubServer, store: ModelStore, tmp_path: Path
) -> None:
    publish(hub)
    other = import_model(str(write_checkpoint(tmp_path / "other")), ModelStore(tmp_path / "elsewhere"))
    with pytest.raises(ModelError, match=rf"^{REPOSITORY} is not model {other.model_id[:12]}"):
        import_model(REPOSITORY, store, wanted=Selection(manifest=other.manifest))
    assert sent_weights(hub) < 2 * HEADER_BYTES
    assert store.list() == ()


def test_block_with_other_content_than_in_manifest_is_refused(
    hub: HubServer, store: ModelStore, tmp_path: Path
) -> None:
    folder = publish(hub)
    manifest = import_model(str(folder), ModelStore(tmp_path / "other")).manifest
    blocks = (replace(manifest.blocks[0], sha256="0" * 64), *manifest.blocks[1:])
    wanted = Selection(manifest=replace(manifest, blocks=blocks), blocks=BlockRange(0, 2))
    with pytest.raises(ModelError, match=r"its block-000.safetensors has another content"):
        import_model(REPOSITORY, store, wanted=wanted)
    assert store.list() == ()
    assert not [path for path in (store.cache_dir / "staging").iterdir() if path.is_dir()]


def test_continues_where_connection_broke(hub: HubServer, store: ModelStore) -> None:
    folder = publish(hub)
    hub.cdn_faults += [lambda _: False] * 4  # the headers of the two shards
    hub.cdn_faults += [break_after(5000), break_after(0), status(503), status(429, Retry_After="0"), status(500)]
    hub.cdn_faults += [login_page, status(520)]
    package = import_model(REPOSITORY, store)
    assert store.verify(package.model_id).corrupt == ()
    assert not package.missing()
    assert not hub.cdn_faults
    assert sent_weights(hub) == size_of_weights(folder) + 5000


def test_urls_that_stay_refused_are_one_line(hub: HubServer, store: ModelStore) -> None:
    publish(hub)
    hub.signed_for = 0
    with pytest.raises(ModelError, match=r"cannot read model-00001\S+ of Somebody/Tiny: .* with HTTP 403 Forbidden$"):
        import_model(REPOSITORY, store)
    assert len(hub.content("model-")) == 3


def test_signed_urls_that_expire_are_renewed(hub: HubServer, store: ModelStore) -> None:
    publish(hub)
    hub.signed_for = 3
    package = import_model(REPOSITORY, store)
    assert store.verify(package.model_id).corrupt == ()
    assert len(hub.signatures) > 5


def test_waits_as_long_as_busy_server_asks(hub: HubServer, store: ModelStore, monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr("node.models.http_file.time.sleep", pauses.append)
    publish(hub)
    hub.hub_faults.append(status(429, Retry_After="7"))
    hub.cdn_faults.append(status(503, Retry_After="9"))
    stages: list[str] = []
    import_model(REPOSITORY, store, progress=lambda stage, *_: stages.append(stage))
    assert sum(pauses) == pytest.approx(16)
    assert sum("waiting: " in stage and "answers HTTP 503 Service Unavailable" in stage for stage in stages) > 40
    hub.cdn_faults.append(status(429, Retry_After="3600"))
    with pytest.raises(SourceError, match="HTTP 429 Too Many Requests; try again in 60 minutes"):
        import_model(REPOSITORY, ModelStore(store.cache_dir / "other"))


def test_interrupted_import_is_continued_by_the_next(hub: HubServer, store: ModelStore, tmp_path: Path) -> None:
    folder = publish(hub)

    class Cancelled(BaseException):
        pass

    def cancel(stage: str, done: int, total: int) -> None:
        if total and done > 0.7 * total and "download" in stage:
            raise Cancelled

    with pytest.raises(Cancelled):
        import_model(REPOSITORY, store, progress=cancel)
    assert store.list() == ()
    hub.sent.clear()
    package = import_model(REPOSITORY, store)
    assert package.model_id == import_model(str(folder), ModelStore(tmp_path / "other")).model_id
    assert store.verify(package.model_id).corrupt == ()
    assert sent_weights(hub) < 0.5 * size_of_weights(folder)
    assert not [path for path in (tmp_path / "cache" / "staging").iterdir() if path.is_dir()]


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (status(502), "answers HTTP 502 Bad Gateway"),
        (status(511), "answers HTTP 511 Network Authentication Required"),
        (login_page, "something else than the file: does the network ask for a login?"),
    ],
)
def test_server_that_stays_away_is_one_line_and_next_import_continues(
    hub: HubServer, store: ModelStore, tmp_path: Path, fault: Fault, reason: str
) -> None:
    publish(hub)
    hub.cdn_faults += [lambda _: False] * 12
    hub.cdn_faults += [fault] * http_file.MAX_FAILURES
    with pytest.raises(SourceError, match=rf"cannot read model-\S+ of Somebody/Tiny: .*{re.escape(reason)}"):
        import_model(REPOSITORY, store)
    assert [path.name for path in (tmp_path / "cache" / "staging").glob("*/package/block-000.safetensors")]
    # The import of anything else deletes it.
    import_model(str(write_checkpoint(tmp_path / "other")), store)
    assert not list((tmp_path / "cache" / "staging").glob("*/package"))


def test_full_disk_is_one_line_and_next_import_continues(
    hub: HubServer, store: ModelStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = publish(hub)
    synced, fsync = 0, os.fsync

    def full(handle: int) -> None:
        nonlocal synced
        synced += 1
        if synced > 5:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(handle)

    with monkeypatch.context() as context:
        context.setattr("node.models.safetensors_file.os", SimpleNamespace(fsync=full))
        with pytest.raises(ModelError, match=r"disk is full; free some space, or set METASWARM_CACHE_DIR"):
            import_model(REPOSITORY, store)
    hub.sent.clear()
    package = import_model(REPOSITORY, store)
    assert store.verify(package.model_id).corrupt == ()
    assert sent_weights(hub) < 0.7 * size_of_weights(folder)
    assert not [path for path in (tmp_path / "cache" / "staging").iterdir() if path.is_dir()]


def test_package_larger_than_free_space_is_refused(
    hub: HubServer, store: ModelStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(hub)
    usage = type("usage", (), {"free": 1 << 19})
    monkeypatch.setattr("node.models.files.shutil.disk_usage", lambda _: usage)
    with pytest.raises(ModelError, match="the package needs 0 MiB, and 0 MiB are free"):
        import_model(REPOSITORY, store)
    # A few blocks need a part of that.
    assert import_model(REPOSITORY, store, wanted=Selection(blocks=BlockRange(1, 3))).present()


def test_server_without_ranges_is_one_line(hub: HubServer, store: ModelStore) -> None:
    publish(hub, llama_tensors(), shards=1)
    hub.cdn_faults += [without_ranges] * 100
    with pytest.raises(ModelError, match=r"cannot send a part of model.safetensors .*HTTP ranges.*`hf download`"):
        import_model(REPOSITORY, store)


@pytest.mark.parametrize(
    ("source", "line"),
    [
        ("somebody/missing", "the hub has no model somebody/missing, or you have no access to it"),
        (f"{REPOSITORY}@v9", f"{REPOSITORY} has no revision v9"),
        ("some/gated", "some/gated is gated: accept its terms on the hub and log in there"),
        ("some/private", "the hub has no model some/private, or you have no access to it"),
    ],
)
def test_what_hub_refuses_is_one_line(
    hub: HubServer, store: ModelStore, monkeypatch: pytest.MonkeyPatch, source: str, line: str
) -> None:
    for repository in (REPOSITORY, "some/gated", "some/private"):
        publish(hub, repository=repository)
    hub.gated, hub.private = {"some/gated"}, {"some/private"}
    monkeypatch.setenv("HF_TOKEN", "hf_another")
    with pytest.raises(ModelError) as error:
        import_model(source, store)
    assert str(error.value) == line


def test_token_opens_gated_and_private_repositories(hub: HubServer, store: ModelStore) -> None:
    publish(hub)
    hub.gated = hub.private = {REPOSITORY}
    assert not import_model(REPOSITORY, store).missing()


def test_unreachable_hub_is_one_line(hub: HubServer, store: ModelStore, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(SourceError, match=r"^cannot list the files of somebody/tiny: .*refused.*try again later$"):
        import_model("somebody/tiny", store)


def test_unsupported_architecture_is_refused_before_any_weights(hub: HubServer, store: ModelStore) -> None:
    publish(hub, model_type="qwen3_next", num_attention_heads=16)
    with pytest.raises(ModelError, match="uses linear attention, which cannot be split into spans here"):
        import_model(REPOSITORY, store)
    assert not any("model-" in line or "tokenizer" in line for line in hub.requests)
    assert store.list() == ()


def test_repository_without_tokenizer_json_is_refused_before_download(hub: HubServer, store: ModelStore) -> None:
    folder = publish(hub)
    (folder / "tekken.json").write_text("{}")
    with pytest.raises(ModelError, match=r"Tiny has its tokenizer only as tekken.json, and no tokenizer.json"):
        import_model(REPOSITORY, store)
    assert not any("model-" in line for line in hub.requests)
    (folder / "tokenizer.json").write_text("{}")
    import_model(REPOSITORY, store)
    assert not any("tekken" in line for line in hub.requests)


def test_memory_does_not_grow_with_the_model(hub: HubServer, store: ModelStore) -> None:
    tensors = llama_tensors(blocks=3)
    tensors["model.layers.1.mlp.weight"] = np.zeros((32 << 20) // 4, np.float32)
    publish(hub, tensors, shards=1)
    del tensors
    peak = 0

    def watch(*_: object) -> None:
        nonlocal peak
        peak = max(peak, tracemalloc.get_traced_memory()[0])

    tracemalloc.start()
    try:
        import_model(REPOSITORY, store, progress=watch)
    finally:
        tracemalloc.stop()
    assert peak < 12 << 20  # the server's pieces included


@pytest.mark.parametrize(
    ("text", "meaning"),
    [
        ("org/repo", HubId("org/repo", None, None)),
        ("org/repo:Q4_K_M", HubId("org/repo", "Q4_K_M", None)),
        ("org/repo@v1.0/x", HubId("org/repo", None, "v1.0/x")),
        ("org/repo:Q4_K_M@v1", HubId("org/repo", "Q4_K_M", "v1")),
        ("org/repo@v1:Q4_K_M", HubId("org/repo", "Q4_K_M", "v1")),
        ("https://huggingface.co/org/repo", HubId("org/repo", None, None)),
        ("https://huggingface.co/org/repo/tree/main", HubId("org/repo", None, None)),
        ("huggingface.co/org/repo/", HubId("org/repo", None, None)),
        ("hf.co/org/repo:Q4_K_M", HubId("org/repo", "Q4_K_M", None)),
        ("https://huggingface.co/org", None),
        ("https://example.org/org/repo", None),
        ("org/repo@a:Q4@b", None),
        ("repo", None),
        ("/org/repo", None),
        ("org/repo/more", None),
        ("org/repo:", None),
    ],
)
def test_parses_repository_with_quantisation_and_revision(text: str, meaning: HubId | None) -> None:
    assert parse_hub_id(text) == meaning


def test_command_line_imports_blocks_from_hub(hub: HubServer, tmp_path: Path) -> None:
    folder = publish(hub, llama_tensors(), shards=1)
    whole = import_model(str(folder), ModelStore(tmp_path / "other"))
    changes = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path), "METASWARM_CACHE_DIR": str(tmp_path / "cache")}
    # The tiny checkpoint has tensors that no architecture has.
    code = "import sys; from node.models import sources; sources.check_tensors = lambda *_: None; "
    code += "from node.cli import run; sys.exit(run(sys.argv[1:]))"
    command = ["model", "import", REPOSITORY, "--json", "--blocks", "1-2"]
    command += ["--manifest", str(whole.path / "manifest.json")]
    done = subprocess.run(
        [sys.executable, "-c", code, *command], env=os.environ | changes, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    imported = json.loads(done.stdout)
    assert (imported["id"], imported["blocks_present"], imported["complete"]) == (whole.model_id, ["1-2"], False)
