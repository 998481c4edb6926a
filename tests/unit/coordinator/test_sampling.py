"""What a request says of how tokens are drawn holds over every route, with drafts, and after a stage was lost."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from node.coordinator.submission import JobError, JobErrorCode, JobRequest, JobResult, TextDelta, TokenLogprob
from node.engine.interface import SliceInput, StepResult
from node.links.outbound_link import OutboundLink
from node.testing.fake_engine import FakeEngine, expected_tokens, fake_span_info
from protocol.connection import PROTOCOL_IDS
from protocol.identity import BlockRange, SessionId
from protocol.limits import MAX_HISTORY_TOKENS
from protocol.messages import FinishReason, Sampling
from selector.task import BASELINE, method
from tests.support.job_peers import BLOCKS, VOCABULARY, Peer, Swarm, open_swarm

PROMPT = (5, 6, 7, 8) * 6
THIRDS = ((0, 3), (3, 6), (6, 9))
WAYS: list[dict[str, Any]] = [
    {"repetition_penalty": 1.3},
    {"frequency_penalty": 0.5, "temperature": 1.0, "seed": 3},
    {"presence_penalty": -1.0, "temperature": 1.0, "seed": -1},
    {"logit_bias": ((3, 1.5), (9, -100.0))},
    {"json_schema": '{"type": "object"}', "temperature": 1.0, "seed": 4},
    {"top_k": 4, "min_p": 0.1, "temperature": 0.7, "seed": 9, "repetition_penalty": 0.9},
]
LATEST, *_, EARLIEST = PROTOCOL_IDS


def right(count: int, *, prompt: tuple[int, ...] = PROMPT, **way: Any) -> tuple[int, ...]:
    """Return what the whole model says, undisturbed and undivided."""
    way = way | {"seed": way.get("seed", 0) % 2**64, "prompt_length": len(prompt)}
    info = fake_span_info(BlockRange(0, BLOCKS), block_count=BLOCKS)
    return expected_tokens(info, prompt, count, Sampling(max_tokens=count, **way))


def request(count: int = 20, *, prompt: tuple[int, ...] = PROMPT, **more: Any) -> JobRequest:
    if "json_schema" in more:  # its text must be able to end
        more["stop_token_ids"] = (VOCABULARY - 1,)
    return JobRequest(model="fake", prompt_tokens=prompt, max_tokens=count, **more)


async def swarm_of(swarm: Swarm, *spans: tuple[int, int]) -> Peer:
    for span in spans:
        await swarm.join(span)
    peer = await swarm.join()
    await swarm.settle()
    return peer


def make_old(peer: Peer) -> None:
    """Let a peer speak the first version of the job protocol and no other."""
    for protocol in PROTOCOL_IDS[:-1]:
        del peer.network._handlers[protocol]  # type: ignore[attr-defined]


def test_sampling_options_change_the_text() -> None:
    assert len({right(20, **way) for way in [*WAYS, {}]}) == len(WAYS) + 1


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("spans", [((0, 9),), THIRDS])
async def test_sampled_text_is_the_same_for_every_split(
    virtual_clock: MockClock, way: dict[str, Any], spans: tuple[tuple[int, int], ...]
) -> None:
    async with open_swarm() as swarm:
        peer = await swarm_of(swarm, *spans)
        assert (await peer.run(request(**way))).token_ids == right(20, **way)


@pytest.mark.parametrize("way", WAYS)
async def test_speculative_decoding_keeps_sampled_text(virtual_clock: MockClock, way: dict[str, Any]) -> None:
    async with open_swarm() as swarm:
        draft = FakeEngine(fake_span_info(BlockRange(0, BLOCKS), block_count=BLOCKS), step_s=0.001)
        await swarm.join(THIRDS[0], draft=draft)
        peer = await swarm_of(swarm, *THIRDS[1:])
        for guessing in ("off", "ngram-8", "draft-8"):
            chosen = method(engine="fused", speculation=guessing) if guessing != "off" else BASELINE
            assert (await peer.run(request(method=chosen.name, **way))).token_ids == right(20, **way), guessing


async def test_long_token_history_is_sent_in_several_messages(virtual_clock: MockClock) -> None:
    prompt = tuple(number * 7 % VOCABULARY for number in range(MAX_HISTORY_TOKENS + 5))
    async with open_swarm() as swarm:
        for span in THIRDS:
            await swarm.join(span, max_positions=MAX_HISTORY_TOKENS + 100)
        peer = await swarm.join()
        known = peer.models.known
        peer.models.known = replace(known, manifest=replace(known.manifest, max_positions=1 << 14))  # type: ignore[call-arg]
        await swarm.settle()
        result = await peer.run(request(4, prompt=prompt, repetition_penalty=1.5))
        assert result.token_ids == right(4, prompt=prompt, repetition_penalty=1.5)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("stage", [0, 1, 2])
async def test_replay_keeps_sampled_text(virtual_clock: MockClock, way: dict[str, Any], stage: int) -> None:
    async with open_swarm() as swarm:
        peer = await swarm_of(swarm, *THIRDS, *THIRDS)
        count = 0
        async with peer.coordinator.submit(request(30, **way)) as events:
            async for event in events:
                if isinstance(event, TextDelta):
                    count += 1
                    if count == 10:
                        swarm.hub.kill(swarm.serving(THIRDS[stage]).id)
                if isinstance(event, JobResult):
                    assert event.replays == 1
                    assert event.token_ids == right(30, **way)


@pytest.mark.parametrize("spans", [((0, 9),), THIRDS])
@pytest.mark.parametrize("top", [0, 3])
async def test_reports_log_probabilities_on_every_split_with_drafts_and_after_a_replay(
    virtual_clock: MockClock, spans: tuple[tuple[int, int], ...], top: int
) -> None:
    async with open_swarm() as swarm:
        peer = await swarm_of(swarm, *spans, *spans)
        for name in ("auto", method(engine="fused", speculation="ngram-8").name):
            logprobs: list[TokenLogprob] = []
            tokens: list[int] = []
            async with peer.coordinator.submit(request(30, top_logprobs=top, method=name)) as events:
                async for event in events:
                    if isinstance(event, TextDelta):
                        logprobs += event.logprobs
                        tokens += event.token_ids
                        if len(tokens) == 10 and name == "auto":
                            swarm.hub.kill(next(each for each in swarm.peers if each.held()[0]).id)
            assert tuple(tokens) == right(30)
            assert [(each.token, each.text, each.logprob) for each in logprobs] == [
                (token, f"{token} ".encode(), -0.5) for token in tokens
            ]
            assert [[(each.token, each.logprob) for each in token.likeliest] for token in logprobs] == [
                [((token + number) % VOCABULARY, -0.5 * (number + 1)) for number in range(top)] for token in tokens
            ]


async def test_older_peer_is_not_last_stage_of_a_job_with_new_sampling(virtual_clock: MockClock) -> None:
    async with open_swarm() as swarm:
        old = await swarm.join((0, 9), step_s=0.001)
        new = await swarm.join((7, 9), step_s=0.05)
        peer = await swarm.join()
        make_old(old)
        await swarm.settle()
        assert {stage.peer for stage in (await peer.run(request())).route} == {old.id}
        for way in [*WAYS, {"min_tokens": 3}]:
            result = await peer.run(request(**way))
            drawn = {} if "min_tokens" in way else way
            assert result.token_ids == right(20, **drawn)
            assert result.route[-1].peer == new.id
            assert result.route[0].peer == old.id, "it can serve any other stage"


async def test_text_of_a_schema_must_be_able_to_end(virtual_clock: MockClock) -> None:
    async with open_swarm() as swarm:
        peer = await swarm_of(swarm, (0, 9))
        ways: tuple[dict[str, Any], ...] = ({"ignore_eos": True, "stop_token_ids": (9,)}, {})
        for fields in ways:
            with pytest.raises(JobError, match="ends with a stop token") as caught:
                await peer.run(JobRequest(model="fake", prompt_tokens=PROMPT, json_schema="{}", **fields))
            assert caught.value.code is JobErrorCode.INVALID


async def test_error_where_no_peer_supports_the_sampling(virtual_clock: MockClock) -> None:
    async with open_swarm() as swarm:
        for _ in range(7):
            make_old(await swarm.join((0, 9)))
        peer = await swarm.join()
        await swarm.settle()
        with pytest.raises(JobError, match=r"supports what the job asks for .*speaks version 1\.0") as caught:
            await peer.run(request(top_k=5, temperature=1.0))
        assert caught.value.code is JobErrorCode.UNCOVERED
        assert (await peer.run(request())).token_ids == right(20)
        new = await swarm.join((0, 9))
        await swarm.settle()
        assert (await peer.run(request(repetition_penalty=1.2))).route[0].peer == new.id


@pytest.mark.parametrize("told", ["nothing", "too little", "too much", "of another model"])
async def test_wrong_token_history_affects_only_its_own_job(
    virtual_clock: MockClock, monkeypatch: pytest.MonkeyPatch, told: str
) -> None:
    tell = OutboundLink.send_history

    def lie(link: OutboundLink, session: SessionId, history: Sequence[int]) -> None:
        wrong: dict[str, tuple[int, ...]] = {
            "nothing": (),
            "too little": tuple(history[:-3]),
            "too much": (1,) * 1000,
            "of another model": (*history[:-1], VOCABULARY),
        }
        tell(link, session, wrong[told])

    async with open_swarm() as swarm:
        peer = await swarm_of(swarm, *THIRDS)
        honest = swarm.peers[0]
        results: list[JobResult] = []

        async def run_honestly() -> None:
            results.append(await honest.run(request(60)))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(run_honestly)
            await trio.sleep(0.2)
            monkeypatch.setattr(OutboundLink, "send_history", lie)
            with pytest.raises(JobError):
                await peer.run(request(repetition_penalty=1.2))
        assert results[0].token_ids == right(60)
        assert results[0].replays == 0


async def test_no_stop_token_is_sampled_before_min_tokens(virtual_clock: MockClock) -> None:
    tokens = right(20)
    async with open_swarm() as swarm:
        peer = await swarm_of(swarm, *THIRDS)
        stopped = await peer.run(request(stop_token_ids=(tokens[4],)))
        assert (stopped.token_ids, stopped.finish_reason) == (tokens[:5], FinishReason.STOP)
        assert stopped.text == "".join(f"{token} " for token in tokens[:4]), "a stop token is none of the text"
        later = await peer.run(request(stop_token_ids=(tokens[4], tokens[9]), min_tokens=5))
        assert later.token_ids[:4] == tokens[:4]
        assert tokens[4] not in later.token_ids[:5]
        assert len(later.token_ids) >= 5
        peer.tokenizer.stop_tokens = (tokens[2],)
        assert tokens[2] not in (await peer.run(request(min_tokens=10))).token_ids[:10]
        ignored = await peer.run(request(stop_token_ids=(tokens[4],), ignore_eos=True))
        assert ignored.token_ids == tokens[:5], "only the model's own are passed over"


async def test_a_stop_string_counts_once_there_are_min_tokens(virtual_clock: MockClock) -> None:
    tokens = right(20)
    async with open_swarm() as swarm:
        peer = await swarm_of(swarm, *THIRDS)
        result = await peer.run(request(stop=(f"{tokens[3]} ", f"{tokens[7]} "), min_tokens=5))
        assert result.finish_reason is FinishReason.STOP
        assert result.text == "".join(f"{token} " for token in tokens[:7])


async def test_max_tokens_beyond_the_context_are_cut(virtual_clock: MockClock) -> None:
    async with open_swarm() as swarm:
        peer = await swarm_of(swarm, *THIRDS)
        prompt = tuple(range(4090 % VOCABULARY)) * (4090 // (4090 % VOCABULARY))
        prompt += (1,) * (4090 - len(prompt))
        for wanted in (7, 8192, 1 << 20):
            result = await peer.run(request(wanted, prompt=prompt))
            assert (len(result.token_ids), result.finish_reason) == (6, FinishReason.LENGTH)
        stop = result.token_ids[3]
        assert (await peer.run(request(1 << 20, prompt=prompt, stop_token_ids=(stop,)))).finish_reason == "stop"


async def test_seeds_are_taken_modulo_64_bits(virtual_clock: MockClock) -> None:
    async with open_swarm() as swarm:
        peer = await swarm_of(swarm, *THIRDS)
        for seed in (-1, -(2**63), 2**63 - 1):
            result = await peer.run(request(temperature=1.0, seed=seed))
            assert result.token_ids == right(20, temperature=1.0, seed=seed)


@pytest.mark.parametrize("way", [WAYS[1], WAYS[4]])
@pytest.mark.parametrize("speculation", ["off", "ngram-8"])
async def test_text_is_the_same_where_steps_leave_slices_out(
    virtual_clock: MockClock, monkeypatch: pytest.MonkeyPatch, way: dict[str, Any], speculation: str
) -> None:
    step, count = FakeEngine.step, 0

    async def leave_out(engine: FakeEngine, slices: Sequence[SliceInput]) -> StepResult:
        nonlocal count
        if not engine.info.is_last:
            return await step(engine, slices)
        for rows in slices:  # as real engines, which keep it
            if rows.history is not None:
                engine._sessions[rows.session].history.reset(rows.history)  # type: ignore[union-attr]
        slices = [replace(rows, history=None) for rows in slices]
        count += 1
        first, *others = slices if count % 2 else slices[::-1]
        result = await step(engine, [first])
        return replace(result, left_out=tuple(rows.session for rows in others))

    monkeypatch.setattr(FakeEngine, "step", leave_out)
    async with open_swarm() as swarm:
        peer = await swarm_of(swarm, *THIRDS)
        results: list[JobResult] = []

        async def run() -> None:
            name = method(engine="fused", speculation=speculation).name
            results.append(await peer.run(request(**way, method=name)))

        async with trio.open_nursery() as nursery:
            for _ in range(4):
                nursery.start_soon(run)
        assert [result.token_ids for result in results] == [right(20, **way)] * 4
        assert not any(result.replays for result in results)
