"""Keys and values in q8_0: what they take, that sessions in f16 stay exact, and what the quality ledger admits."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from node.coordinator.method_choice import admitted_methods
from node.coordinator.submission import JobError, JobRequest
from node.engine.interface import EngineError, EngineFull, EngineOptions, SessionOptions, SliceInput, Variant
from node.engine.llamacpp.context import SequenceRows, SpanContext, cells_for
from node.engine.llamacpp.shard import LLAMACPP, LlamaShard
from node.models import sources
from node.models.importer import import_model
from node.models.store import ModelStore
from protocol.identity import ModelId
from protocol.measurements import QualityBound
from protocol.tensors import tensor_from_tokens
from selector.features import arithmetic_of
from selector.quality import MeasuredQuality
from selector.task import Method, parse_method, portfolio
from tests.support.heuristic_selection import NullQualityStore
from tests.support.job_peers import FakeModels, NumberTokenizer
from tests.unit.engine.driving import GREEDY, InProcess, decode, session
from tests.unit.engine.llamacpp.architectures import ARCHITECTURES, VOCABULARY, WIDE_HEADS, write_model
from tests.unit.engine.llamacpp.packages import GgufFiles, write_package

Q8_0 = Variant("llamacpp", "native", "q8_0")
METHOD = parse_method("kv=q8_0|prefix_cache=on", "gguf")
TEXT: list[int] = np.random.default_rng(0).integers(0, VOCABULARY, 900).tolist()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> GgufFiles:
    folder = tmp_path_factory.mktemp("wide")
    return write_package(write_model(WIDE_HEADS, folder / "model.gguf"), folder / "package")


def opened(files: GgufFiles, positions: int) -> InProcess:
    [shard] = files.shards([], EngineOptions(threads=1, kv_positions=positions))
    shard.prepare(Q8_0)
    return InProcess(shard)


def kv_of(engine: InProcess, variant: Variant) -> SpanContext:
    shard = engine.shard
    assert isinstance(shard, LlamaShard)
    return shard._kv[variant].context


def begin(engine: InProcess, number: int, variant: Variant, positions: int) -> None:
    engine.open_now(session(number), positions, SessionOptions(sampling=GREEDY, variant=variant))


def prefill(engine: InProcess, number: int, tokens: Sequence[int]) -> None:
    result = engine.step_now([SliceInput(session(number), 0, tensor_from_tokens(tokens), 1)])
    assert not result.faults


def saved_bytes(context: SpanContext, tokens: Sequence[int]) -> int:
    """Return the size of a sequence as llama.cpp writes it: keys, values, and some bytes about each position."""
    context.run([SequenceRows(0, 0, np.array(tokens, np.int32), 1)])
    return int(context._library.llama_state_seq_get_size(context._context, 0))


def test_position_takes_what_llamacpp_allocates_for_it(files: GgufFiles) -> None:
    engine = opened(files, 512)
    f16, q8_0 = kv_of(engine, LLAMACPP), kv_of(engine, Q8_0)
    assert f16.position_bytes == engine.info.kv_bytes_per_position == 4 * 2 * 64 * 2  # blocks, K and V, elements, f16
    assert q8_0.position_bytes == 4 * 2 * 64 * 34 // 32
    grown = [saved_bytes(each, TEXT[:96]) - saved_bytes(each, TEXT[:32]) for each in (f16, q8_0)]
    assert grown[0] - grown[1] == 64 * (f16.position_bytes - q8_0.position_bytes)
    assert 0 <= grown[1] - 64 * q8_0.position_bytes <= 64 * 16


async def test_sessions_of_both_types_share_a_span(files: GgufFiles) -> None:
    alone = files.alone()
    engine = opened(files, 1024)
    texts = [TEXT[:100], TEXT[40:90], TEXT[300:340]]
    for number, text in enumerate(texts):
        assert await decode([engine], text, 12, of=session(number), variant=LLAMACPP) == alone.decode(text, 12)
        narrow = await decode([engine], text, 12, of=session(10 + number), variant=Q8_0)
        assert narrow == await decode([opened(files, 1024)], text, 12, variant=Q8_0)
    rows = np.array(TEXT[:200])
    shard = engine.shard
    f16, q8_0 = (shard.run_alone(variant, rows, draws=200) for variant in (LLAMACPP, Q8_0))
    assert np.array_equal(f16, alone.logits(TEXT[:200], outputs=200))
    assert 0 < np.abs(q8_0 - f16).max() < f16.std()


def test_more_sessions_fit_in_q8_0(files: GgufFiles) -> None:
    def fitting(variant: Variant) -> int:
        engine = opened(files, 512)
        for number in range(20):
            try:
                begin(engine, number, variant, 128)
            except EngineFull:
                return number
        return 20

    assert fitting(LLAMACPP) == 4
    # Each takes 17/32 of its reservation, which must fit whole when it opens: 128 + 5 * 68 of 512 positions.
    assert fitting(Q8_0) == 6


def test_memory_that_closed_sessions_took_goes_to_the_other_type(files: GgufFiles, monkeypatch: Any) -> None:
    monkeypatch.setattr("node.engine.llamacpp.context.FIRST_POSITIONS", 256)
    engine = opened(files, 1024)
    f16, q8_0 = kv_of(engine, LLAMACPP), kv_of(engine, Q8_0)
    budget_bytes = cells_for(1024) * f16.position_bytes

    def taken_bytes() -> int:
        return sum(each.positions * each.position_bytes for each in (f16, q8_0))

    begin(engine, 1, LLAMACPP, 900)
    prefill(engine, 1, TEXT)
    assert f16.positions >= 900
    engine.close_now(session(1), keep=False)
    begin(engine, 2, LLAMACPP, 128)
    prefill(engine, 2, TEXT[:100])
    for number in (3, 4):
        begin(engine, number, Q8_0, 560)
        prefill(engine, number, TEXT[:550])
        assert taken_bytes() <= budget_bytes + 256 * q8_0.position_bytes  # llama.cpp rounds up
    assert q8_0.positions >= 1100
    assert f16.positions < 600
    again = engine.step_now([SliceInput(session(2), 100, tensor_from_tokens(TEXT[100:101]), 1)])
    assert not again.faults


def test_heads_that_q8_0_does_not_divide_are_refused_in_one_line(tmp_path: Path) -> None:
    narrow = write_package(write_model(ARCHITECTURES["llama3"], tmp_path / "model.gguf"), tmp_path / "package")
    [shard] = narrow.shards([])
    with pytest.raises(EngineError, match=r"no KV cache of type q8_0 .*: .*block size 32 does not divide") as caught:
        shard.prepare(Q8_0)
    assert "\n" not in str(caught.value)
    assert shard.variants() == {LLAMACPP}
    with pytest.raises(EngineError, match="is not for GGUF packages"):
        shard.prepare(Q8_0._replace(kv="q2_0"))


class Ledger(NullQualityStore):
    """Figures as the measuring process prints them."""

    def __init__(self, figures: dict[str, dict[str, float] | None]) -> None:
        self._figures = figures

    def quality(self, model: ModelId, method: Method) -> MeasuredQuality | None:
        figures = self._figures.get(method.kv_key)
        return None if figures is None else MeasuredQuality(**figures)


def test_measured_quality_admits_q8_0_as_near_and_never_as_exact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "make_gguf_tokenizer", lambda _source, folder, _progress: folder.mkdir())
    package = import_model(str(write_model(WIDE_HEADS, tmp_path / "model.gguf")), ModelStore(tmp_path / "cache"))
    wanted = ["llamacpp/native/fp32", METHOD.kv_key, "llamacpp/native/q2_0/fp32"]
    request = {"windows": [TEXT[:128], TEXT[128:256]], "lineages": wanted}
    command = [sys.executable, "-m", "node.engine.quality", str(package.path)]
    done = subprocess.run(command, input=json.dumps(request).encode(), capture_output=True, check=True, timeout=60)
    figures = json.loads(done.stdout)
    assert figures["llamacpp/native/fp32"] == {"greedy_agreement": 1.0, "mean_kl": 0.0, "perplexity_change": 0.0}
    assert figures["llamacpp/native/q2_0/fp32"] is None
    narrow = figures[METHOD.kv_key]
    assert 0 < narrow["mean_kl"] < 0.02
    assert 0 < abs(narrow["perplexity_change"]) < 0.01
    assert 0.8 < narrow["greedy_agreement"] <= 1

    model = FakeModels(NumberTokenizer()).gguf
    ledger = Ledger(figures)

    def types(bound: QualityBound) -> set[str]:
        return {each.kv for each in admitted_methods(JobRequest(model="", prompt="1", quality=bound), model, ledger)}

    assert types(QualityBound.EXACT) == {"auto"}
    assert types(QualityBound.NEAR) == {"auto", "q8_0"}
    named = JobRequest(model="", prompt="1", method=METHOD.name, quality=QualityBound.NEAR)
    assert admitted_methods(named, model, ledger) == [METHOD]
    with pytest.raises(JobError, match=r"kv=q8_0.* is not exact: use --quality near"):
        admitted_methods(JobRequest(model="", prompt="1", method=METHOD.name), model, ledger)


def test_method_names_the_type_only_where_it_is_not_the_engines_own() -> None:
    assert "kv=q8_0" in METHOD.name
    assert METHOD.kv_key == str(SessionOptions(variant=Q8_0).kv_key) == "llamacpp/native/q8_0/fp32"
    assert not METHOD.exact
    assert arithmetic_of(METHOD.name).kv_bits == 8
    assert parse_method("kv=auto", "gguf") == parse_method("baseline", "gguf")
    assert sum("kv=" in each.name for each in portfolio("gguf")) == 2
    assert not any("kv=" in each.name for each in portfolio("safetensors"))
    with pytest.raises(ValueError, match="engine=fused supports kv auto, not q8_0"):
        parse_method("engine=fused|kv=q8_0", "safetensors")
