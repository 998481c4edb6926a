"""Prefix sharing: hashes of prompts' pages, by which stages find cached keys and values, and claims on new pages."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

import trio
from cachetools import LRUCache

from protocol.identity import ModelId
from protocol.limits import MAX_PREFIX_BYTES, PAGE_POSITIONS, PREFIX_HASH_BYTES

REMEMBERED_PAGES: Final = 65_536
"""Hashes of pages of past prompts that the coordinator remembers."""


def page_hashes(tokens: Sequence[int], salt: bytes) -> tuple[bytes, ...]:
    """Return the hashes of the whole pages of a prompt, each covering the pages before it.

    The last token is in none of them, since its row is always computed. The salt is the coordinator's secret, so that
    a stage cannot test by the hashes which of two texts it is asked to serve.
    """
    pages = min((len(tokens) - 1) // PAGE_POSITIONS, MAX_PREFIX_BYTES // PREFIX_HASH_BYTES)
    hashes: list[bytes] = []
    before = salt
    for page in range(pages):
        text = tokens[page * PAGE_POSITIONS : (page + 1) * PAGE_POSITIONS]
        before = hashlib.sha256(before + b"".join(token.to_bytes(4, "little") for token in text)).digest()
        before = before[:PREFIX_HASH_BYTES]
        hashes.append(before)
    return tuple(hashes)


@dataclass(eq=False, slots=True, kw_only=True)
class PrefixClaim:
    """A prompt's pages, and which of them it is the first to compute.

    `shared_share`: part of the prompt, 0 to 1, that recent prompts began with, too. `owner`: the claim of a prompt that
    is being computed now and shares at least half of this one, so that waiting for it pays.
    """

    pages: Sequence[bytes]
    own_pages: Sequence[bytes] = ()
    shared_share: float = 0.0
    owner: "PrefixClaim | None" = None
    released: trio.Event = field(default_factory=trio.Event)


class RecentPrompts:
    """The first pages of recent prompts of this coordinator, and the claims on those that are being computed."""

    def __init__(self, salt: bytes, capacity: int = REMEMBERED_PAGES) -> None:
        self._salt = salt
        self._pages: LRUCache[bytes, None] = LRUCache(capacity)
        self._claims: dict[bytes, PrefixClaim] = {}

    def record_prompt(self, model: ModelId, tokens: Sequence[int], key_sha256: str = "") -> PrefixClaim:
        """Remember a prompt, and claim its new pages until `release`. Another model's keys and values are others.

        So are another API key's: by what is found in caches, and how fast, it could guess the prompts of this one.
        """
        pages = page_hashes(tokens, self._salt + bytes.fromhex(model) + bytes.fromhex(key_sha256))
        known = next((number for number, page in enumerate(pages) if page not in self._pages), len(pages))
        shared_share = known * PAGE_POSITIONS / len(tokens)
        claim = PrefixClaim(
            pages=pages,
            own_pages=pages[known:],
            shared_share=shared_share,
            owner=self._claims.get(pages[known - 1]) if shared_share >= 0.5 else None,
        )
        self._claims.update(dict.fromkeys(claim.own_pages, claim))
        for page in pages:
            self._pages[page] = None
        return claim

    def release(self, claim: PrefixClaim) -> None:
        """Wake the jobs that wait for a claim: its pages are computed, or never will be. May be called again."""
        if claim.released.is_set():
            return
        for page in claim.own_pages:
            if self._claims.get(page) is claim:
                del self._claims[page]
        claim.released.set()
