"""What prompts have in common: hashes of their pages, by which stages find keys and values that they have already."""

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from typing import Final

from protocol.limits import MAX_PREFIX_BYTES, PAGE_POSITIONS, PREFIX_HASH_BYTES

REMEMBERED_PAGES: Final = 65_536
"""Pages of past prompts of which the coordinator keeps the hash."""


def page_hashes(tokens: Sequence[int], salt: bytes) -> bytes:
    """Return the hashes of the whole pages of a prompt, one after another, each covering the pages before it.

    The last token is in none of them, since its row is always computed. The salt is the coordinator's secret, so that
    a stage cannot tell by the hashes which of two texts it is asked to serve.
    """
    pages = min((len(tokens) - 1) // PAGE_POSITIONS, MAX_PREFIX_BYTES // PREFIX_HASH_BYTES)
    hashes: list[bytes] = []
    before = salt
    for page in range(pages):
        text = tokens[page * PAGE_POSITIONS : (page + 1) * PAGE_POSITIONS]
        before = hashlib.sha256(before + b"".join(token.to_bytes(4, "little") for token in text)).digest()
        before = before[:PREFIX_HASH_BYTES]
        hashes.append(before)
    return b"".join(hashes)


class RecentPrefixes:
    """The pages that prompts of late began with, as this coordinator saw them."""

    def __init__(self, room: int = REMEMBERED_PAGES) -> None:
        self._room = room
        self._pages: OrderedDict[bytes, None] = OrderedDict()

    def meet(self, hashes: bytes, prompt_tokens: int) -> float:
        """Return the part of a prompt, 0 to 1, that prompts before it began with, too; and remember it."""
        pages = [hashes[at : at + PREFIX_HASH_BYTES] for at in range(0, len(hashes), PREFIX_HASH_BYTES)]
        known = 0
        for page in pages:
            if page not in self._pages:
                break
            known += 1
        for page in pages:
            self._pages[page] = None
            self._pages.move_to_end(page)
        while len(self._pages) > self._room:
            self._pages.popitem(last=False)
        return known * PAGE_POSITIONS / prompt_tokens
