"""Hashes of prompts' pages, what prompts share, and who computes a shared prefix."""

import hashlib

import pytest

from node.coordinator.prefix_sharing import RecentPrompts, page_hashes
from protocol.identity import ModelId
from protocol.limits import PAGE_POSITIONS, PREFIX_HASH_BYTES

SALT = b"s" * 16
MODEL, OTHER_MODEL = ModelId("ab" * 32), ModelId("cd" * 32)


def test_page_hash_covers_all_pages_before() -> None:
    tokens = list(range(3 * PAGE_POSITIONS))
    hashes = page_hashes(tokens, SALT)
    assert len(hashes) == 2, "the last token is in no page"
    assert page_hashes([*tokens, 0], SALT)[:2] == hashes
    first = hashlib.sha256(SALT + b"".join(token.to_bytes(4, "little") for token in tokens[:PAGE_POSITIONS])).digest()
    assert hashes[0] == first[:PREFIX_HASH_BYTES]
    other = page_hashes([1, *tokens[1:]], SALT)
    assert other[0] != hashes[0]
    assert other[1] != hashes[1]
    assert page_hashes(tokens, b"t" * 16) != hashes
    assert page_hashes(tokens[:PAGE_POSITIONS], SALT) == ()


def test_shared_share_counts_common_first_pages() -> None:
    recent = RecentPrompts(SALT)
    shared = list(range(4 * PAGE_POSITIONS))
    one, two = [*shared, *range(900, 932), 1], [*shared, *range(700, 732), 1]
    assert recent.record_prompt(MODEL, one).shared_share == 0
    assert recent.record_prompt(MODEL, two).shared_share == pytest.approx(4 / 5, abs=0.01)
    assert recent.record_prompt(MODEL, one).shared_share == pytest.approx(1, abs=0.01)
    assert recent.record_prompt(MODEL, list(range(500, 600))).shared_share == 0


def test_old_prompts_are_evicted() -> None:
    recent = RecentPrompts(SALT, capacity=2)
    prompts = [[number] * (PAGE_POSITIONS + 1) for number in range(3)]
    for prompt in prompts:
        recent.record_prompt(MODEL, prompt)
    assert recent.record_prompt(MODEL, prompts[2]).shared_share > 0.9
    assert recent.record_prompt(MODEL, prompts[0]).shared_share == 0


def test_claim_has_an_owner_until_its_pages_are_computed() -> None:
    recent = RecentPrompts(SALT)
    prompt = list(range(4 * PAGE_POSITIONS))
    first = recent.record_prompt(MODEL, prompt)
    second = recent.record_prompt(MODEL, prompt)
    assert first.owner is None
    assert second.owner is first
    assert not second.own_pages
    assert recent.record_prompt(MODEL, [*prompt[:PAGE_POSITIONS], *range(900, 1100)]).owner is None, (
        "it shares too little"
    )
    of_another_model = recent.record_prompt(OTHER_MODEL, prompt)
    assert (of_another_model.owner, of_another_model.shared_share) == (None, 0)
    recent.release(first)
    recent.release(first)
    assert first.released.is_set()
    assert recent.record_prompt(MODEL, prompt).owner is None
