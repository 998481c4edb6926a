"""The quality store: measures once, keeps the figures, and bounds the methods that are offered."""

import json
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import trio

from node.coordinator import quality_store
from node.coordinator.method_choice import admitted_methods
from node.coordinator.quality_store import LocalQualityStore, kv_keys
from node.coordinator.submission import JobError, JobErrorCode, JobRequest
from node.models.errors import ModelError
from node.models.library import KnownModel, Library
from node.models.manifest import Manifest
from node.models.store import Package
from protocol.identity import BlockRange
from protocol.measurements import QualityBound
from selector.task import method
from tests.support.job_peers import FakeModels, NumberTokenizer

INT8 = method(engine="fused", arithmetic="int8")
W8A8 = method(engine="fused", arithmetic="w8a8")
GOOD = {"greedy_agreement": 0.99, "mean_kl": 0.004, "perplexity_change": 0.001}
FAIR = {"greedy_agreement": 0.9, "mean_kl": 0.05, "perplexity_change": 0.03}
BAD = {"greedy_agreement": 0.5, "mean_kl": 0.5, "perplexity_change": 0.6}


class Here:
    """Has all files of the model, or lacks some."""

    def __init__(self, folder: Path, lacking_bytes: int = 0) -> None:
        self.folder = folder
        self.lacking: int | None = lacking_bytes

    async def weights(self, manifest: Manifest, blocks: BlockRange, *, use_catalogue: bool) -> Package:
        await trio.lowlevel.checkpoint()
        return cast("Package", SimpleNamespace(path=self.folder))

    def in_use(self, package: Package, blocks: BlockRange) -> AbstractAsyncContextManager[None]:
        return nullcontext()

    def lacking_bytes(self, manifest: Manifest) -> int:
        if self.lacking is None:
            raise ModelError("the package was removed")
        return self.lacking


def here(folder: Path, lacking_bytes: int = 0) -> Library:
    return cast("Library", Here(folder, lacking_bytes))


def known_model() -> KnownModel:
    return FakeModels(NumberTokenizer()).known


def measuring(tmp_path: Path, figures: dict[str, Any]) -> Sequence[str]:
    """Return a command that counts its calls, checks what it is asked, and answers."""
    script = (
        "import json, sys; asked = json.load(sys.stdin); open(sys.argv[1], 'a').write('x')\n"
        "assert len(asked['windows']) == 4 and all(len(w) > 1 for w in asked['windows'])\n"
        "figures = json.loads(sys.argv[2])\n"
        "print(json.dumps({name: figures.get(name) for name in asked['lineages']}))"
    )
    return [sys.executable, "-c", script, str(tmp_path / "calls"), json.dumps(figures)]


@asynccontextmanager
async def running(store: LocalQualityStore) -> AsyncIterator[None]:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(store.run)
        yield
        nursery.cancel_scope.cancel()


async def until_known(store: LocalQualityStore) -> None:
    with trio.fail_after(60):
        while store.request(known_model()):
            await trio.sleep(0.01)


def request(quality: QualityBound, name: str = "auto") -> JobRequest:
    return JobRequest(model="fake", prompt="1", quality=quality, method=name)


async def test_quality_bound_admits_measured_methods_within_it(tmp_path: Path) -> None:
    figures = {INT8.kv_key: GOOD, W8A8.kv_key: FAIR, "fused/bf16/fp32": BAD}
    store = LocalQualityStore(here(tmp_path), tmp_path, command=measuring(tmp_path, figures))
    async with running(store):
        # The first job that would take a lossy method has it measured, and is told to come again.
        with pytest.raises(JobError, match="is being measured: try again") as caught:
            admitted_methods(request(QualityBound.NEAR, INT8.name), known_model(), store)
        assert caught.value.retry_after_s
        assert caught.value.code is JobErrorCode.MEASURING, "the peers have room"
        assert all(each.exact for each in admitted_methods(request(QualityBound.ANY), known_model(), store))
        await until_known(store)
    admitted = {
        quality: {each.arithmetic for each in admitted_methods(request(quality), known_model(), store)}
        for quality in QualityBound
    }
    assert admitted == {
        QualityBound.EXACT: {"fp32"},
        QualityBound.NEAR: {"fp32", "int8"},
        QualityBound.ANY: {"fp32", "int8", "w8a8"},
    }
    with pytest.raises(JobError, match="use --quality any"):
        admitted_methods(request(QualityBound.NEAR, W8A8.name), known_model(), store)
    with pytest.raises(JobError, match=r"\+60.0%, beyond"):
        admitted_methods(request(QualityBound.ANY, "engine=fused|arithmetic=bf16"), known_model(), store)
    assert len(kv_keys("safetensors")) == len(set(kv_keys("safetensors"))) > 4


@pytest.mark.parametrize("changed", ['"torch": "', '"onnxruntime": "', '"format": '])
async def test_model_is_measured_once_and_not_for_exact_jobs(tmp_path: Path, changed: str) -> None:
    for _ in range(2):  # the second time after a restart
        store = LocalQualityStore(here(tmp_path), tmp_path, command=measuring(tmp_path, {INT8.kv_key: GOOD}))
        async with running(store):
            admitted_methods(request(QualityBound.EXACT), known_model(), store)
            await until_known(store)
        quality = store.quality(known_model().id, INT8)
        assert quality is not None
        assert quality.mean_kl == 0.004
    assert (tmp_path / "calls").read_text() == "x"
    # What is damaged, of other versions or of another arithmetic, is measured again.
    (kept,) = (tmp_path / "quality").iterdir()
    assert changed in kept.read_text()
    kept.write_text(kept.read_text().replace(changed, f"{changed}1"))
    store = LocalQualityStore(here(tmp_path), tmp_path, command=measuring(tmp_path, {}))
    async with running(store):
        await until_known(store)
    assert (tmp_path / "calls").read_text() == "xx"
    assert store.quality(known_model().id, INT8) is None


@pytest.mark.parametrize("fault", ["crash", "nonsense", "too large"])
async def test_lossy_method_without_measurement_is_not_admitted(tmp_path: Path, fault: str) -> None:
    command = [sys.executable, "-c", "raise SystemExit('no')" if fault == "crash" else "print('[1]')"]
    store = LocalQualityStore(here(tmp_path, 1 << 40 if fault == "too large" else 0), tmp_path, command=command)
    async with running(store):
        await until_known(store)
    with pytest.raises(JobError, match="with this model was not measured"):
        admitted_methods(request(QualityBound.ANY, INT8.name), known_model(), store)


async def test_failed_measurement_is_told_and_tried_again_once_files_came_or_after_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = Here(tmp_path)
    library.lacking = None
    command = measuring(tmp_path, {INT8.kv_key: GOOD})
    store = LocalQualityStore(cast("Library", library), tmp_path, command=command)
    async with running(store):
        await until_known(store)
        assert store.failure(known_model().id) == "the package was removed"
        library.lacking = 1 << 40
        await until_known(store)
        with pytest.raises(JobError, match="bytes of the model are missing: import it"):
            admitted_methods(request(QualityBound.NEAR, INT8.name), known_model(), store)
        library.lacking = 1 << 39
        assert store.request(known_model()), "files came"
        await until_known(store)
        assert not store.request(known_model()), "nothing changed"
        monkeypatch.setattr(quality_store, "RETRY_S", -1.0)
        assert store.request(known_model()), "a while has passed"
        library.lacking = 0
        monkeypatch.undo()
        await until_known(store)
    assert admitted_methods(request(QualityBound.NEAR, INT8.name), known_model(), store)
    assert store.failure(known_model().id) is None
