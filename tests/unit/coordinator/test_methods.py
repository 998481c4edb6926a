"""Methods over several stages: whatever is chosen, the text is the same; the votes decide; nothing stays behind."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace

import pytest
import trio
from trio.testing import MockClock

from node.coordinator.coordinator import OWNER_LIMIT_S
from node.coordinator.method_choice import Choice, SelectionRequest, Votes, WeighVotes
from node.coordinator.submission import JobError, JobErrorCode, JobRequest, JobResult, RequestOrigin
from node.engine.interface import REFERENCE, Variant
from node.links.base_link import LinkBroken
from node.links.outbound_link import OutboundLink
from node.stages.scheduler import Batching, PolicyController
from node.stages.voter import Agreement, StageVote
from node.testing.fake_engine import FakeEngine, expected_tokens, fake_span_info
from protocol.forms import Digest
from protocol.identity import BlockRange, ModelId
from protocol.measurements import QualityBound
from protocol.messages import Begin, Sampling
from selector.task import BASELINE, PORTFOLIO, Method, TaskContext, method, portfolio
from tests.support.heuristic_selection import HeuristicChoice, HeuristicChooser, HeuristicVoter
from tests.support.job_peers import BLOCKS, Peer, open_swarm
from tests.unit.coordinator.test_jobs import THIRDS, all_free, swarm_of_thirds

SHARED = tuple(random.Random(1).randrange(1000) for _ in range(100))
PROMPTS = [
    SHARED[:7],
    (*SHARED, 1, 2, 3),
    (*SHARED, 9, 9, 9, 9, 9, 9, 9),
    tuple(range(200)),
    (5, 6, 7, 8) * 12,
    SHARED[:96],
    (*SHARED[:64], *range(40)),
    (1,),
]
EXACT = [each for each in portfolio("safetensors") if each.exact]


def right(prompt: tuple[int, ...], count: int, sampling: Sampling | None = None) -> tuple[int, ...]:
    return expected_tokens(fake_span_info(BlockRange(0, BLOCKS), block_count=BLOCKS), prompt, count, sampling)


def request(prompt: tuple[int, ...], max_tokens: int = 12, chosen: Method | None = None, **more: object) -> JobRequest:
    name = "auto" if chosen is None else chosen.name
    fields: dict[str, object] = {"model": "fake", "prompt_tokens": prompt, "max_tokens": max_tokens, "method": name}
    return JobRequest(**{**fields, **more})  # type: ignore[arg-type]


async def run_all(peer: Peer, requests: list[JobRequest]) -> list[JobResult]:
    results: dict[int, JobResult] = {}

    async def run(number: int) -> None:
        results[number] = await peer.run(requests[number])

    async with trio.open_nursery() as nursery:
        for number in range(len(requests)):
            nursery.start_soon(run, number)
    return [results[number] for number in range(len(requests))]


@pytest.mark.parametrize("batching", Batching)
async def test_every_exact_method_generates_the_same_text_for_eight_jobs(
    virtual_clock: MockClock, batching: Batching
) -> None:
    async with open_swarm(controller=lambda: PolicyController(batching=batching, step_rows=64)) as swarm:
        draft = FakeEngine(fake_span_info(BlockRange(0, BLOCKS), block_count=BLOCKS), step_s=0.001)
        await swarm.join(THIRDS[0], draft=draft)
        await swarm.join(THIRDS[1])
        await swarm.join(THIRDS[2])
        peer = await swarm.join()
        await swarm.settle()
        for chosen in EXACT:
            results = await run_all(peer, [request(prompt, 12, chosen) for prompt in PROMPTS])
            assert [result.token_ids for result in results] == [right(prompt, 12) for prompt in PROMPTS], chosen.name
            assert {result.method.name for result in results} == {chosen.name}
            assert results[0].method.stage_policy == {"batching": batching.value, "step_rows": "64"}
        await all_free(swarm)


async def test_speculative_decoding_keeps_sampled_text(virtual_clock: MockClock) -> None:
    async with open_swarm() as swarm:
        peer = await swarm_of_thirds(swarm)
        for seed in range(6):
            for chosen in (BASELINE, method(engine="fused", speculation="ngram-8")):
                asked = request(PROMPTS[4], 20, chosen, temperature=1.0, seed=seed)
                sampling = Sampling(temperature=1.0, seed=seed, max_tokens=20)
                assert (await peer.run(asked)).token_ids == right(PROMPTS[4], 20, sampling)


async def test_shared_prefix_is_computed_once(virtual_clock: MockClock) -> None:
    cached = method(engine="fused", prefix_cache="on", prefill_chunk="64")
    async with open_swarm() as swarm:
        peer = await swarm_of_thirds(swarm)
        first = await peer.run(request(PROMPTS[1], 5, cached))
        second = await peer.run(request(PROMPTS[2], 5, cached))
        assert (first.usage.cached_tokens, second.usage.cached_tokens) == (0, 96)
        assert second.token_ids == right(PROMPTS[2], 5)
        assert second.timing.ttft_s < first.timing.ttft_s
        # Another variant, another wire, another coordinator: none of them finds what is not theirs.
        assert (await peer.run(request(PROMPTS[2], 5, method(prefix_cache="on")))).usage.cached_tokens == 0
        assert (await peer.run(request(PROMPTS[2], 5, BASELINE))).usage.cached_tokens == 0
        assert (await swarm.peers[0].run(request(PROMPTS[2], 5, cached))).usage.cached_tokens == 0
        await all_free(swarm)


async def test_api_keys_share_no_prefixes(virtual_clock: MockClock) -> None:
    async with open_swarm() as swarm:
        peer = await swarm_of_thirds(swarm)

        async def cached(number: int, key_sha256: str) -> int:
            asked = request(PROMPTS[number], 5, method(prefix_cache="on"))
            result = await peer.run(replace(asked, origin=RequestOrigin(key_sha256=key_sha256)))
            return result.usage.cached_tokens

        assert await cached(1, "ab" * 32) == 0
        assert await cached(2, "cd" * 32) == 0, "it could guess what the other one asked"
        assert await cached(2, "") == 0
        assert await cached(2, "ab" * 32) == 96
        await all_free(swarm)


async def test_concurrent_prompts_compute_a_shared_prefix_once(virtual_clock: MockClock) -> None:
    cached = method(prefix_cache="on")
    prompts = [(*range(200), number) for number in range(8)]
    async with open_swarm() as swarm:
        peer = await swarm_of_thirds(swarm)
        results = await run_all(peer, [request(prompt, 5, cached) for prompt in prompts])
        assert sorted(result.usage.cached_tokens for result in results) == [0, *[192] * 7]
        assert [result.token_ids for result in results] == [right(prompt, 5) for prompt in prompts]
        await all_free(swarm)


async def test_prefix_claim_is_released_by_cancelled_and_uncached_jobs(virtual_clock: MockClock) -> None:
    cached = method(prefix_cache="on")
    first, second = ((*range(900, 300, -3), number) for number in range(2))
    third, fourth = ((*range(300, 900, 3), number) for number in range(2))
    async with open_swarm() as swarm:
        peer = await swarm_of_thirds(swarm)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(peer.run, request(first, 300, cached))
            await trio.sleep(0.01)
            nursery.cancel_scope.cancel()
        began_s = trio.current_time()
        result = await peer.run(request(second, 1, cached))
        assert trio.current_time() - began_s < OWNER_LIMIT_S / 4
        assert result.token_ids == right(second, 1)
        # A leader that caches nothing is not waited for, however long it takes.
        async with trio.open_nursery() as nursery:
            nursery.start_soon(peer.run, request(third, 300, BASELINE))
            await trio.sleep(0.01)
            began_s = trio.current_time()
            await peer.run(request(fourth, 1, cached))
            assert trio.current_time() - began_s < OWNER_LIMIT_S / 4
            nursery.cancel_scope.cancel()


async def test_result_reports_the_method_and_its_votes(virtual_clock: MockClock) -> None:
    async with open_swarm() as swarm:
        peer = await swarm_of_thirds(swarm)
        result = await peer.run(request(PROMPTS[0]))
        assert [vote.peer for vote in result.consensus.votes] == [each.id for each in swarm.peers[:3]]
        scores = result.consensus.votes[0].scores
        assert result.method.name == result.consensus.agreed == min(scores, key=lambda name: scores[name])
        assert all(PORTFOLIO[name].exact for name in scores)


async def test_chosen_method_is_ready_on_every_stage(virtual_clock: MockClock) -> None:
    async with open_swarm() as swarm:
        await swarm.join((0, 5))
        await swarm.join((5, 9), variants=[REFERENCE])
        peer = await swarm.join()
        await swarm.settle()
        assert (await peer.run(request(PROMPTS[0]))).method.switches["engine"] == "eager"
        # What was asked for has been built meanwhile.
        await trio.sleep(3)
        assert Variant("fused", "fp32") in swarm.peers[1].engines[0].variants()
        assert (await peer.run(request(PROMPTS[0]))).method.switches["engine"] != "eager"


async def test_error_for_a_method_that_is_not_ready_yet(virtual_clock: MockClock) -> None:
    async with open_swarm() as swarm:
        peer = await swarm.join((0, 9), variants=[])
        await swarm.settle()
        with pytest.raises(JobError, match="not ready") as caught:
            await peer.run(request(PROMPTS[0], 5, method(engine="fused", speculation="ngram-4")))
        assert caught.value.retry_after_s
        assert caught.value.code is JobErrorCode.NOT_READY, "its blocks are served"


@pytest.mark.parametrize(
    ("name", "quality", "complaint"),
    [
        ("engine=fused|arithmetic=int8", QualityBound.EXACT, "use --quality"),
        ("engine=fused|arithmetic=int8", QualityBound.ANY, "was not measured"),
        ("batching=static", QualityBound.EXACT, "policy of a stage"),
        ("fast", QualityBound.EXACT, "invalid method"),
    ],
)
async def test_inadmissible_method_is_a_one_line_error(
    virtual_clock: MockClock, name: str, quality: QualityBound, complaint: str
) -> None:
    async with open_swarm() as swarm:
        peer = await swarm.join((0, 9))
        with pytest.raises(JobError, match=complaint) as caught:
            await peer.run(JobRequest(model="fake", prompt="1 2", method=name, quality=quality))
        assert caught.value.code is JobErrorCode.INVALID
        assert "\n" not in caught.value.message


def standing(weights: dict[str, int], statement: bytes = bytes(32)) -> Agreement:
    """What a swarm may have agreed."""
    return Agreement(3, Digest(statement), Digest(bytes(32)), weights, {})


class Partial(HeuristicVoter):
    """Says that one method costs nothing, and every other a lot."""

    def __init__(self, favourite: Method) -> None:
        self._favourite = favourite

    async def vote(self, model: ModelId, context: TaskContext, methods: Sequence[Method]) -> StageVote:
        return StageVote({method.name: 0.0 if method == self._favourite else 9.0 for method in methods})


class NoOpinion(HeuristicChooser):
    async def choose(self, question: SelectionRequest) -> Choice:
        class Equal(HeuristicChoice):
            def ballot(self, votes: Votes, weigh: WeighVotes) -> Mapping[str, float]:
                return {method.name: 0.0 for method in self.order}

        return Equal(question.context, question.admitted)


async def test_votes_are_weighted_by_agreed_reputation(virtual_clock: MockClock) -> None:
    first, second = method(engine="fused"), method(engine="onnxruntime")
    weights: dict[str, int] = {}
    agreed = standing(weights)
    for standings, weighed in (([agreed, agreed], True), ([agreed, standing({}, statement=b"1" * 32)], False)):
        async with open_swarm() as swarm:
            trusted = await swarm.join((0, 5), voter=Partial(first), agreed=standings[0])
            other = await swarm.join((5, 9), voter=Partial(second), agreed=standings[1])
            peer = await swarm.join(chooser=NoOpinion(), agreed=agreed)
            await swarm.settle()
            for liked, of_first, of_second in ((first, 9000, 10), (second, 10, 9000)):
                weights.update({trusted.id: of_first, other.id: of_second, peer.id: 10})
                result = await peer.run(request(PROMPTS[0]))
                assert result.consensus.weighed is weighed
                if weighed:
                    assert result.method.name == liked.name
            await all_free(swarm)


@pytest.mark.parametrize("lie", ["method", "ballot", "missing", "no own ballot", "weights"])
async def test_stage_refuses_a_method_that_the_votes_did_not_agree_on(
    virtual_clock: MockClock, monkeypatch: pytest.MonkeyPatch, lie: str
) -> None:
    honest = OutboundLink.begin

    def lying(self: OutboundLink, message: Begin) -> None:
        ballots = list(message.ballots)
        if lie == "method":
            message = replace(message, method=BASELINE.name)
        elif lie == "missing":
            message = replace(message, ballots=())
        elif lie == "weights":
            message = replace(message, statement=b"7" * 32)
        elif lie == "no own ballot":
            message = replace(message, ballots=tuple(ballots[:-1]))
        else:
            ballots[0] = replace(ballots[0], scores=tuple(-1.0 for _ in ballots[0].scores))
            message = replace(message, ballots=tuple(ballots))
        honest(self, message)

    monkeypatch.setattr(OutboundLink, "begin", lying)
    async with open_swarm() as swarm:
        peer = await swarm.join((0, 9))
        await swarm.settle()
        with pytest.raises((JobError, LinkBroken)):
            await peer.run(request(PROMPTS[0]))
        await all_free(swarm)


async def test_stages_follow_the_methods_that_the_coordinator_accepts(virtual_clock: MockClock) -> None:
    class Wary(HeuristicChoice):
        def ballot(self, votes: Votes, weigh: WeighVotes) -> Mapping[str, float]:
            admitted = {method.name for method in self.order}
            guessed = {method.name for method in self.order if method.drafter == "draft"}
            # Nobody here has a draft model, which only the first stage needs.
            assert [set(scores) for scores in votes] == [admitted - guessed, admitted, admitted]
            return {BASELINE.name: 0.0}

    class WaryChooser(HeuristicChooser):
        async def choose(self, question: SelectionRequest) -> Choice:
            return Wary(question.context, question.admitted)

    async with open_swarm() as swarm:
        for span in THIRDS:
            peer = await swarm.join(span, chooser=WaryChooser())
        await swarm.settle()
        result = await peer.run(request(PROMPTS[0]))
        assert result.method.name == BASELINE.name
        assert len(result.consensus.votes[0].scores) > 1


@pytest.mark.parametrize("count", [200, pytest.param(1000, marks=pytest.mark.soak)])
async def test_many_jobs_a_third_cancelled_free_all_memory(virtual_clock: MockClock, count: int) -> None:
    rng = random.Random(7)
    async with open_swarm() as swarm:
        for span in THIRDS:
            await swarm.join(span, step_s=0.002, kv_positions=1 << 15)
        peer = await swarm.join()
        await swarm.settle()
        chosen = [method(prefix_cache="on"), method(engine="fused", speculation="ngram-4", prefix_cache="on"), None]
        done = cancelled = 0

        async def one(number: int, room: trio.CapacityLimiter) -> None:
            nonlocal done, cancelled
            prompt = (*SHARED[: rng.randrange(40)], number % 1000)
            cancel_after_s = rng.uniform(0, 0.3) if number % 3 == 0 else float("inf")
            async with room:
                with trio.move_on_after(cancel_after_s) as scope:
                    result = await peer.run(request(prompt, rng.randrange(1, 6), rng.choice(chosen)))
                    if number % 20 == 1:  # the right text takes its time to compute
                        assert result.token_ids == right(prompt, len(result.token_ids))
                    done += 1
                cancelled += scope.cancelled_caught

        room = trio.CapacityLimiter(16)
        async with trio.open_nursery() as nursery:
            for number in range(count):
                nursery.start_soon(one, number, room)
        assert done + cancelled == count
        assert cancelled > count / 10
        await all_free(swarm)
        assert peer.coordinator.statistics.running == 0
