"""Methods of GGUF packages: what a job of one may be served with, beside jobs of safetensors packages."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial

import pytest
import trio
from trio.testing import MockClock

from node.coordinator.method_choice import admitted_methods
from node.coordinator.observation import Recorder
from node.coordinator.submission import JobError, JobErrorCode, JobRequest, JobResult
from node.coordinator.trial import TrialSpec
from node.coordinator.trial_runner import BenchmarkRunner
from node.engine.interface import Variant, reference_variant
from node.identity import Identity
from node.selection.samples import sample_of
from node.testing.fake_engine import FAKE_GGUF_MODEL, FakeEngine, expected_tokens, fake_span_info
from protocol.identity import BlockRange, ModelId
from protocol.measurements import QualityBound
from protocol.observations import SignedObservation, verify_observation
from selector.quality import MeasuredQuality
from selector.task import Method, parse_method, portfolio
from selector.workloads import TrialWorkload
from tests.support.heuristic_selection import NullQualityStore
from tests.support.job_peers import BLOCKS, FakeModels, NumberTokenizer, Peer, Swarm, open_swarm
from tests.unit.coordinator.test_jobs import THIRDS, all_free
from tests.unit.coordinator.test_methods import PROMPTS, request, right, run_all

GGUF = fake_span_info(BlockRange(0, BLOCKS), model=FAKE_GGUF_MODEL, block_count=BLOCKS)
METHODS = portfolio("gguf")
BASELINE = METHODS[0]
SHORT = TrialWorkload(prompt_tokens=16, max_tokens=4)
NARROW = parse_method("activations=int8|prefill_chunk=128|prefix_cache=on", "gguf")

gguf_request = partial(request, model="fake-gguf")


@asynccontextmanager
async def mixed_swarm() -> AsyncIterator[tuple[Swarm, Peer]]:
    """Hold a swarm where three peers serve either package; yield one that serves nothing."""
    async with open_swarm() as swarm:
        for span in THIRDS:
            await swarm.join(span)
        draft = FakeEngine(GGUF, step_s=0.001)
        for number, span in enumerate(THIRDS):
            await swarm.join(span, model=FAKE_GGUF_MODEL, draft=None if number else draft)
        peer = await swarm.join()
        await swarm.settle()
        yield swarm, peer


class Measured(NullQualityStore):
    """Figures that were measured for wire codecs."""

    def __init__(self, **figures: MeasuredQuality) -> None:
        self._figures = figures

    def quality(self, model: ModelId, method: Method) -> MeasuredQuality | None:
        return self._figures.get(method.activations) if method.kv_key.startswith("llamacpp/native/") else None


async def test_mixed_swarm_serves_each_package_by_methods_of_its_format(virtual_clock: MockClock) -> None:
    async with mixed_swarm() as (swarm, peer):
        pairs = [(request(prompt), gguf_request(prompt)) for prompt in PROMPTS[:4]]
        results = await run_all(peer, [each for pair in pairs for each in pair])
        for number, result in enumerate(results):
            prompt, is_gguf = PROMPTS[number // 2], number % 2 == 1
            assert (result.method.switches["engine"] == "llamacpp") is is_gguf
            assert result.token_ids == (expected_tokens(GGUF, prompt, 12) if is_gguf else right(prompt, 12))
            offered = {name for vote in result.consensus.votes for name in vote.scores}
            assert {parse_method(name).package_format for name in offered} == {"gguf" if is_gguf else "safetensors"}
        await all_free(swarm)


async def test_every_exact_method_of_a_gguf_package_generates_the_same_text(virtual_clock: MockClock) -> None:
    async with mixed_swarm() as (swarm, peer):
        for chosen in (each for each in METHODS if each.exact):
            results = await run_all(peer, [gguf_request(prompt, 12, chosen) for prompt in PROMPTS[:5]])
            assert [result.token_ids for result in results] == [expected_tokens(GGUF, each, 12) for each in PROMPTS[:5]]
            assert {result.method.name for result in results} == {chosen.name}
        await all_free(swarm)


async def test_lost_stage_of_a_gguf_package_is_replaced(virtual_clock: MockClock) -> None:
    results: list[JobResult] = []

    async def run(peer: Peer) -> None:
        results.append(await peer.run(gguf_request(PROMPTS[1], 80)))

    async with open_swarm() as swarm:
        lost = await swarm.join((0, 5), model=FAKE_GGUF_MODEL)
        await swarm.join((5, 9), model=FAKE_GGUF_MODEL)
        peer = await swarm.join()
        await swarm.settle()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(run, peer)
            await trio.sleep(0.5)
            await swarm.join((0, 5), model=FAKE_GGUF_MODEL)
            lost.engines[0].crash()
        assert results[0].replays == 1
        assert results[0].token_ids == expected_tokens(GGUF, PROMPTS[1], 80)
        assert results[0].method.switches["engine"] == "llamacpp"


async def test_route_of_a_gguf_package_leaves_a_span_where_the_next_begins(virtual_clock: MockClock) -> None:
    async with open_swarm() as swarm:
        for span in ((0, 6), (4, 9)):
            await swarm.join(span, model=FAKE_GGUF_MODEL)
        peer = await swarm.join()
        await swarm.settle()
        result = await peer.run(gguf_request(PROMPTS[0]))
        assert result.token_ids == expected_tokens(GGUF, PROMPTS[0], 12)
        assert [stage.blocks for stage in result.route] == [BlockRange(0, 4), BlockRange(4, 9)]


async def test_method_that_runs_whole_spans_has_no_route_through_overlapping_ones(virtual_clock: MockClock) -> None:
    method = next(each for each in portfolio("safetensors") if each.engine == "onnxruntime")
    async with open_swarm() as swarm:
        for span in ((0, 6), (4, 9)):
            await swarm.join(span)
        peer = await swarm.join()
        await swarm.settle()
        assert (await peer.run(request(PROMPTS[0]))).token_ids == right(PROMPTS[0], 12)
        with pytest.raises(JobError, match="spans of fake that do not meet") as caught:
            await peer.run(request(PROMPTS[0], chosen=method))
        assert caught.value.code is JobErrorCode.INVALID, "with this method it comes to nothing at any time"


@pytest.mark.parametrize(
    ("model", "name", "complaint"),
    [
        (
            "fake-gguf",
            "engine=fused|arithmetic=int8",
            "a gguf package: use engine=llamacpp.arithmetic=native, engine=onnxruntime.*; or use auto",
        ),
        ("fake-gguf", "activations=int8", "is not exact: use --quality near or any"),
        ("fake", "engine=llamacpp", "a safetensors package: use engine=eager.*; or use auto"),
    ],
)
async def test_method_that_the_package_lacks_is_a_one_line_error(
    virtual_clock: MockClock, model: str, name: str, complaint: str
) -> None:
    async with mixed_swarm() as (_, peer):
        with pytest.raises(JobError, match=complaint) as caught:
            await peer.run(JobRequest(model=model, prompt="1 2", method=name))
        assert caught.value.code is JobErrorCode.INVALID
        assert "\n" not in caught.value.message


async def test_text_of_a_method_means_that_of_the_package(virtual_clock: MockClock) -> None:
    async with mixed_swarm() as (_, peer):
        for name in ("baseline", "prefix_cache=on"):
            result = await peer.run(JobRequest(model="fake-gguf", prompt_tokens=(1, 2), max_tokens=2, method=name))
            assert result.method.name == parse_method(name, "gguf").name


def test_wire_codecs_of_a_gguf_package_are_admitted_by_their_figures() -> None:
    store = Measured(bf16=MeasuredQuality(0.001, 0.001), int8=MeasuredQuality(0.03, 0.05))
    model = FakeModels(NumberTokenizer()).gguf

    def codecs(bound: QualityBound) -> set[str]:
        asked = JobRequest(model="fake-gguf", prompt="1", quality=bound)
        return {each.activations for each in admitted_methods(asked, model, store)}

    assert codecs(QualityBound.EXACT) == {"fp32"}
    assert codecs(QualityBound.NEAR) == {"fp32", "bf16"}
    assert codecs(QualityBound.ANY) == {"fp32", "bf16", "int8"}
    with pytest.raises(JobError, match="use --quality any"):
        admitted_methods(JobRequest(model="", prompt="1", method=NARROW.name), model, store)


def test_weights_of_two_bytes_are_not_held_in_four_unless_a_job_names_it() -> None:
    known = FakeModels(NumberTokenizer()).known
    shape = replace(known.manifest, config={**known.manifest.config, "dtype": "bfloat16"})
    graphs = "engine=onnxruntime|arithmetic=fp32"
    for manifest, is_offered in ((known.manifest, True), (shape, False)):
        model = replace(known, manifest=manifest)
        offered = admitted_methods(JobRequest(model="", prompt="1"), model, NullQualityStore())
        assert any(each.kv_key.startswith("onnxruntime/fp32") for each in offered) == is_offered
        assert admitted_methods(JobRequest(model="", prompt="1", method=graphs), model, NullQualityStore())


async def test_trial_of_a_gguf_package_is_recorded_with_its_weight_type(virtual_clock: MockClock) -> None:
    kept: list[SignedObservation] = []

    async def publish(observation: SignedObservation) -> None:
        await trio.lowlevel.checkpoint()
        kept.append(observation)

    async with mixed_swarm() as (_, peer):
        trials = BenchmarkRunner(peer.coordinator, Recorder(Identity(b"7" * 32), publish))
        trial = await trials.run(TrialSpec(model="fake-gguf", methods=(), workload=SHORT, rounds=1))
        assert [each.method for each in (trial.baseline, *trial.methods)] == list(METHODS)
        assert all(each.runs for each in trial.methods if each.method.exact)
        assert {each.method.name for each in trial.methods if each.error} == {
            each.name for each in METHODS if not each.exact
        }
    for each in kept:
        sample = sample_of(verify_observation(each.envelope).observation)
        assert sample is not None
        assert sample.context.weight_type == "q4_1"
        assert sample.log_ratio == 0 or sample.method != BASELINE.name
    assert reference_variant("gguf") == Variant(BASELINE.engine, BASELINE.arithmetic)
