"""KV pages: never given out twice, always freed, and a hit is a page of the same text, KV key and coordinator."""

import random
from collections import Counter
from dataclasses import replace

import pytest

from node.engine.interface import (
    PAGE_HASH_BYTES,
    PAGE_POSITIONS,
    REFERENCE,
    EngineError,
    EngineFull,
    KvCompatibilityKey,
    Prefix,
    SessionOptions,
    SliceInput,
    Variant,
)
from node.engine.kv_allocator import EXPIRY_ROUNDS, KvAllocator
from node.testing.fake_engine import FakeEngine, expected_tokens, fake_span_info
from protocol.identity import BlockRange
from protocol.tensors import tensor_from_tokens, tokens_from_tensor
from tests.unit.engine.driving import GREEDY, session

INFO = fake_span_info(BlockRange(0, 4), block_count=4, kv_positions=8 * PAGE_POSITIONS)
OPTIONS = SessionOptions(variant=REFERENCE, sampling=GREEDY)
FUSED = SessionOptions(sampling=GREEDY, variant=Variant("fused", "fp32"))


def prefix(names: str, namespace: str = "me") -> Prefix:
    """Each letter stands for a page of text."""
    hashes = b"".join(names[: end + 1].encode().ljust(PAGE_HASH_BYTES)[:PAGE_HASH_BYTES] for end in range(len(names)))
    return Prefix(namespace=namespace, hashes=hashes)


def calculate(pages: KvAllocator, number: int, names: str, options: SessionOptions = OPTIONS, extra: int = 1) -> int:
    """Open a session, begin it and calculate its whole prompt; return what was cached."""
    pages.open(session(number), len(names) * PAGE_POSITIONS + extra, prefix(names))
    cached = pages.begin(session(number), options).cached
    pages.advance(session(number), len(names) * PAGE_POSITIONS + extra)
    return cached


def test_prefix_cache_hits_during_and_after_a_session() -> None:
    pages = KvAllocator(INFO)
    assert calculate(pages, 1, "ab") == 0
    assert calculate(pages, 2, "abc", extra=0) == 64
    pages.close(session(1))
    pages.close(session(2))
    assert (pages.reserved_positions, pages.cached_positions) == (0, 96)
    assert pages.open(session(3), 100, prefix("abd")) == {OPTIONS.kv_key: 64}


def test_prompts_of_ever_new_peers_leave_nothing_behind_once_evicted() -> None:
    """Neither those that never had a whole page nor those that had."""
    pages = KvAllocator(INFO)
    for number, whole in enumerate([0, 1] * 50):
        pages.open(session(number), PAGE_POSITIONS, prefix("a", f"peer {number}"))
        pages.begin(session(number), OPTIONS)
        pages.advance(session(number), 1 + whole * (PAGE_POSITIONS - 1))
        pages.close(session(number))
    assert len(pages._index) == pages.cached_positions // PAGE_POSITIONS == 8
    while pages.cached_positions:
        pages.expire()
    assert not pages._index


def test_cached_pages_that_no_session_uses_for_a_while_are_evicted() -> None:
    pages = KvAllocator(INFO)
    calculate(pages, 1, "ab")
    pages.close(session(1))
    calculate(pages, 2, "cd")
    for _ in range(EXPIRY_ROUNDS):
        assert not pages.expire()
    calculate(pages, 3, "a")
    pages.close(session(3))
    pages.close(session(2))
    assert pages.expire()
    assert pages.cached_positions == 3 * PAGE_POSITIONS, "b alone was unused for so long"
    assert not any(pages.expire() for _ in range(EXPIRY_ROUNDS - 1))
    assert pages.open(session(4), 100, prefix("abd")) == {OPTIONS.kv_key: PAGE_POSITIONS}
    assert pages.expire()
    assert pages.cached_positions == PAGE_POSITIONS, "a session is about to begin with it"
    pages.close(session(4))
    assert pages.expire()
    assert pages.cached_positions == 0


def test_prefix_cache_hit_needs_same_namespace_and_kv_key() -> None:
    pages = KvAllocator(INFO)
    calculate(pages, 1, "ab")
    pages.close(session(1))
    assert pages.open(session(2), 64, prefix("ab", "another")) == {}
    assert pages.open(session(3), 64, prefix("xb")) == {}
    pages.close(session(2))
    pages.close(session(3))
    pages.open(session(4), 64, prefix("ab"))
    assert pages.begin(session(4), FUSED).copied == ()
    pages.close(session(4))
    lossy = SessionOptions(variant=REFERENCE, sampling=GREEDY, activations="bf16")
    assert calculate(pages, 5, "ab", lossy) == 0
    assert pages.open(session(6), 64, prefix("ab")) == {
        KvCompatibilityKey(REFERENCE, "fp32"): 64,
        KvCompatibilityKey(REFERENCE, "bf16"): 64,
    }


def test_pinned_pages_survive_until_begin() -> None:
    pages = KvAllocator(INFO)
    calculate(pages, 1, "abc")
    pages.close(session(1))
    pages.open(session(2), 5 * PAGE_POSITIONS, prefix("abc"))
    with pytest.raises(EngineFull):
        pages.open(session(3), PAGE_POSITIONS, None)
    placement = pages.begin(session(2), OPTIONS)
    assert len(placement.copied) == 3
    assert not set(placement.copied) & set(placement.pages)
    pages.open(session(3), PAGE_POSITIONS, None)


def test_cached_pages_never_block_a_session() -> None:
    pages = KvAllocator(INFO)
    calculate(pages, 1, "abcde")
    pages.close(session(1))
    assert pages.open(session(2), 8 * PAGE_POSITIONS, prefix("abcde")) == {}
    assert pages.cached_positions == 0


def test_prefix_cache_evicts_least_recently_used_and_prompt_ends_first() -> None:
    pages = KvAllocator(INFO)
    for number, names in ((1, "ab"), (2, "xy"), (3, "a")):
        calculate(pages, number, names, extra=0)
        pages.close(session(number))
    pages.open(session(4), 6 * PAGE_POSITIONS, None)
    pages.close(session(4))
    assert pages.open(session(5), PAGE_POSITIONS, prefix("ab")) == {OPTIONS.kv_key: 32}
    assert pages.open(session(6), PAGE_POSITIONS, prefix("xy")) == {OPTIONS.kv_key: 32}


def test_recalculated_or_failed_pages_leave_the_prefix_cache() -> None:
    pages = KvAllocator(INFO)
    calculate(pages, 1, "ab")
    pages.rewind(session(1), 40)
    assert pages.open(session(2), 64, prefix("ab")) == {OPTIONS.kv_key: 32}
    pages.advance(session(1), 64)
    pages.open(session(3), 64, prefix("ab"))
    pages.close(session(1), keep=False)
    assert pages.cached_positions == 0
    assert pages.begin(session(3), OPTIONS).cached == 0


def test_pages_of_uncached_session_are_not_found_and_stay_its_own_until_it_is_closed() -> None:
    pages = KvAllocator(INFO)
    calculate(pages, 1, "ab")
    pages.open(session(2), 64, prefix("ab"))
    pages.uncache(session(1))
    assert pages.begin(session(2), OPTIONS).cached == 0
    pages.rename(session(1), session(3))
    pages.advance(session(3), 65)
    assert pages.open(session(4), 64, prefix("ab")) == {}
    held = pages.reserved_positions
    pages.close(session(3))
    assert pages.reserved_positions == held - 96
    assert pages.open(session(5), 64, prefix("ab")) == {}
    pages.uncache(session(1))


def test_session_can_opt_out_of_the_prefix_cache() -> None:
    pages = KvAllocator(INFO)
    calculate(pages, 1, "ab", SessionOptions(variant=REFERENCE, sampling=GREEDY, prefix_cache=False))
    assert pages.open(session(2), 64, prefix("ab")) == {}


def test_kv_allocator_never_double_allocates_or_leaks_pages() -> None:
    chance = random.Random(5)
    pages = KvAllocator(INFO)
    begun: dict[int, tuple[int, ...]] = {}
    waiting: set[int] = set()
    for number in range(5000):
        match chance.choice(["open", "open", "begin", "advance", "rewind", "close"]):
            case "open":
                names = "".join(chance.choices("ab", k=chance.randrange(4)))
                try:
                    pages.open(session(number), chance.randrange(1, 120), prefix(names))
                except EngineFull:
                    continue
                waiting.add(number)
            case "begin" if waiting:
                one = waiting.pop()
                begun[one] = pages.begin(session(one), chance.choice([OPTIONS, FUSED])).pages
            case "advance" if begun:
                one = chance.choice(sorted(begun))
                pages.advance(session(one), chance.randrange(len(begun[one]) * PAGE_POSITIONS + 1))
            case "rewind" if begun:
                pages.rewind(session(chance.choice(sorted(begun))), chance.randrange(100))
            case "close" if begun or waiting:
                one = chance.choice(sorted({*begun, *waiting}))
                begun.pop(one, None)
                waiting.discard(one)
                pages.close(session(one), keep=chance.random() < 0.8)
        held = Counter(page for run in begun.values() for page in run)
        assert max(held.values(), default=1) == 1
        assert len(held) * PAGE_POSITIONS <= pages.reserved_positions
        assert pages.reserved_positions + pages.cached_positions <= INFO.kv_positions
    for one in {*begun, *waiting}:
        pages.close(session(one), keep=False)
    pages.open(session(0), INFO.kv_positions, None)


async def test_fake_session_reuses_cached_pages() -> None:
    engine = FakeEngine(INFO)
    text = [number * 7 % 100 for number in range(70)]
    drawn = []
    for number in (1, 2):
        await engine.open(session(number), 80, prefix("ab"))
        cached = await engine.begin(session(number), OPTIONS)
        rows = SliceInput(session=session(number), position=cached, tensor=tensor_from_tokens(text[cached:]), draws=1)
        drawn.append(tokens_from_tensor((await engine.step([rows])).outputs[0].tensor))
        await engine.close(session(number))
    assert drawn == [list(expected_tokens(INFO, text, 1))] * 2
    statistics = engine.statistics()
    assert (statistics.cached_positions, statistics.reserved_positions) == (64, 0)


async def test_speculative_decoding_stops_at_the_first_rejected_draft() -> None:
    engine = FakeEngine(INFO)
    text = [3, 1, 4, 1, 5]
    right = list(expected_tokens(INFO, text, 4))
    for number, drafts, kept in ((1, right[:3], 4), (2, [right[0], 0, right[2]], 2), (3, [0, 0, 0], 1)):
        await engine.open(session(number), 20)
        await engine.begin(session(number), OPTIONS)
        rows = SliceInput(
            session=session(number),
            position=0,
            tensor=tensor_from_tokens([*text, *drafts]),
            draws=4,
            drafts=tuple(drafts),
        )
        assert tokens_from_tensor((await engine.step([rows])).outputs[0].tensor) == right[:kept]
    with pytest.raises(EngineError, match="do not belong"):
        await engine.step(
            [SliceInput(session=session(1), position=0, tensor=tensor_from_tokens(text), draws=1, drafts=(1,))]
        )


def test_sessions_and_cached_prompts_together_keep_to_the_limit_of_sequences() -> None:
    pages = KvAllocator(replace(INFO, max_sequences=2))
    for number, name in enumerate("ab"):
        calculate(pages, number, name, extra=0)
    with pytest.raises(EngineFull, match="serves 2 sessions at once"):
        pages.open(session(2), PAGE_POSITIONS, None)
    for number in range(2):
        pages.close(session(number))
    pages.open(session(2), PAGE_POSITIONS, prefix("b"))  # evicts the other prompt, and keeps the one that it wants
    reservation = pages.begin(session(2), OPTIONS)
    assert reservation.cached == PAGE_POSITIONS
    assert reservation.dropped == (0,)


def test_narrow_keys_and_values_hold_what_they_take() -> None:
    narrow = Variant("llamacpp", "native", "q8_0")
    pages = KvAllocator(replace(INFO, kv_shares={"q8_0": 0.5}))
    for number in range(4):
        pages.open(session(number), 4 * PAGE_POSITIONS, None)
        assert pages.held_positions(session(number)) == 4 * PAGE_POSITIONS
        pages.begin(session(number), SessionOptions(sampling=GREEDY, variant=narrow))
        assert pages.held_positions(session(number)) == 2 * PAGE_POSITIONS
        if number == 2:  # 6 of 8 pages are taken: none opens who may need 4
            with pytest.raises(EngineFull):
                pages.open(session(9), 4 * PAGE_POSITIONS, None)
            pages.close(session(0))


def test_pages_given_up_are_told_again_after_a_session_that_was_withdrawn() -> None:
    pages = KvAllocator(INFO)
    calculate(pages, 1, "ab")
    pages.close(session(1), keep=False)
    pages.open(session(2), PAGE_POSITIONS, None)
    told = pages.begin(session(2), OPTIONS)
    assert told.dropped
    pages.close(session(2))
    pages.drop_again(told.dropped)
    pages.open(session(3), PAGE_POSITIONS, None)
    assert set(told.dropped) - {*told.pages} <= {*pages.begin(session(3), OPTIONS).dropped}
