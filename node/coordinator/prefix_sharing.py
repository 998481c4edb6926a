"""What prompts have in common: hashes of their pages, by which stages find keys and values that they have already."""

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

import trio

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


@dataclass(eq=False, slots=True)
class Turn:
    """A prompt's part in computing what prompts begin with.

    `pages`: those that it is the first to have. `leader`: the turn of a prompt that is being computed now and has at
    least half of this one in common with it, and is worth waiting for.
    """

    pages: Sequence[bytes]
    leader: "Turn | None"
    over: trio.Event = field(default_factory=trio.Event)


class RecentPrompts:
    """The pages that prompts of late began with, as this coordinator saw them, and who computes them first."""

    def __init__(self, room: int = REMEMBERED_PAGES) -> None:
        self._room = room
        self._pages: OrderedDict[bytes, None] = OrderedDict()
        self._computing: dict[bytes, Turn] = {}

    def take_turn(self, hashes: bytes, prompt_tokens: int) -> Turn:
        """Return the turn of a prompt about to be met, until `end_turn`."""
        pages = _pages(hashes)
        known = self._known(pages)
        is_most = known and 2 * known * PAGE_POSITIONS >= prompt_tokens
        turn = Turn(pages[known:], self._computing.get(pages[known - 1]) if is_most else None)
        for page in turn.pages:
            self._computing[page] = turn
        return turn

    def end_turn(self, turn: Turn) -> None:
        """Let those go on who wait for a prompt's pages: they are computed, or never will be. Twice is no error."""
        for page in turn.pages:
            if self._computing.get(page) is turn:
                del self._computing[page]
        turn.over.set()

    def meet(self, hashes: bytes, prompt_tokens: int) -> float:
        """Return the part of a prompt, 0 to 1, that prompts before it began with, too; and remember it."""
        pages = _pages(hashes)
        known = self._known(pages)
        for page in pages:
            self._pages[page] = None
            self._pages.move_to_end(page)
        while len(self._pages) > self._room:
            self._pages.popitem(last=False)
        return known * PAGE_POSITIONS / prompt_tokens

    def _known(self, pages: Sequence[bytes]) -> int:
        return next((number for number, page in enumerate(pages) if page not in self._pages), len(pages))


def _pages(hashes: bytes) -> list[bytes]:
    return [hashes[at : at + PREFIX_HASH_BYTES] for at in range(0, len(hashes), PREFIX_HASH_BYTES)]
