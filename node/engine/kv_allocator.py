"""The KV allocator: pages of KV memory for sessions, the prefix cache with its eviction, and admission of rows.

Pure rules, shared by the real engine, where they run on the node's side of the worker's socket, and the fake one. A
session reserves all the pages it may ever need when it opens, contiguous if possible, so that paged attention can read
its keys and values in place. What narrower keys and values do not need is given back when it begins, as only then its
variant is known.

The whole pages of a prompt enter the prefix cache as soon as they are calculated. A session that finds its prompt
there copies the pages into its own: a copy takes a hundredth of the time of calculating, and leaves its keys and values
contiguous. Pages without a session are evicted, least recently used first, when sessions need the memory, and when no
session has used them for some minutes, so that an idle node gives the memory back. Between open and begin the pages
found are pinned by a reference count.
"""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice, takewhile

from node.engine.interface import (
    PAGE_POSITIONS,
    BadRows,
    EngineError,
    EngineFull,
    KvCompatibilityKey,
    Prefix,
    SessionNotOpen,
    SessionOptions,
    SliceInput,
    SpanInfo,
)
from protocol.identity import SessionId
from protocol.tensors import DType

HIDDEN_DTYPES = frozenset({DType.FLOAT32, DType.FLOAT16, DType.BFLOAT16, DType.BLOCK_INT8})
EXPIRY_ROUNDS = 5
"""A cached page is evicted once `expire` has found it unused so many times in a row."""

_FREE = b"\x01"

_PAGE_UNITS = 1024
"""KV memory is counted in these, so that pages of narrower keys and values take fewer than others."""

_Group = tuple[str, KvCompatibilityKey]
"""The namespace and KV key of cached pages."""


@dataclass(slots=True, eq=False)
class _Entry:
    """A page in the prefix cache. `session`: the one that calculated it, while open. `pins`: sessions to begin."""

    page: int
    group: _Group
    hash: bytes
    session: SessionId | None
    origin: "_SessionPages"
    """Of the session that calculated it, open or closed."""
    pins: int = 0
    idle_rounds: int = 0
    """How often `expire` has found it without a session since it was last used."""


@dataclass(slots=True, eq=False)
class _SessionPages:
    positions: int
    pages: tuple[int, ...]
    prefix: Prefix | None
    pinned: Mapping[KvCompatibilityKey, list[_Entry]]
    page_positions: int = PAGE_POSITIONS
    kv_key: KvCompatibilityKey | None = None
    """Once begun, if it uses the prefix cache."""
    begun: bool = False
    entries: dict[int, _Entry] = field(default_factory=dict)
    """Cached pages that the session calculated, by their number in the prompt."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KvReservation:
    """The pages of a session, in order. `copied`: cached pages that are copied to its first ones.

    `page_positions`: how many positions each holds. `dropped`: pages whose content was given up since the last session
    began, for engines that free it at once.
    """

    positions: int
    pages: tuple[int, ...]
    copied: tuple[int, ...] = ()
    dropped: tuple[int, ...] = ()
    page_positions: int = PAGE_POSITIONS

    @property
    def cached(self) -> int:
        """Positions cached from the start."""
        return len(self.copied) * self.page_positions


def page_count(info: SpanInfo) -> int:
    """Return how many pages there are, numbered from 0, if all sessions have the narrowest keys and values."""
    units = info.kv_positions // PAGE_POSITIONS * _PAGE_UNITS
    return units // min([_PAGE_UNITS, *_page_units(info).values()])


def _page_units(info: SpanInfo) -> dict[str, int]:
    return {kv: math.ceil(_PAGE_UNITS * share) for kv, share in info.kv_shares.items()}


class KvAllocator:
    """The KV memory of one span, never overcommitted."""

    def __init__(self, info: SpanInfo) -> None:
        self._info = info
        self._page_units = _page_units(info)
        self._units = info.kv_positions // PAGE_POSITIONS * _PAGE_UNITS
        self._free_units = self._units
        self._free = bytearray(_FREE * page_count(info))
        self._taken_units: dict[int, int] = {}
        """By page that is not free."""
        self._sessions: dict[SessionId, _SessionPages] = {}
        self._index: dict[str, dict[KvCompatibilityKey, dict[bytes, _Entry]]] = {}
        """Cached pages by namespace, KV key and hash, without empty ones: peers may name any number of namespaces."""
        # Cached pages without a session, least recently used first.
        self._idle: dict[_Entry, None] = {}
        self._closed: Counter[_SessionPages] = Counter()
        """Idle pages by the closed session that calculated them."""
        self._dropped: set[int] = set()

    def __len__(self) -> int:
        return len(self._sessions)

    def __contains__(self, session: SessionId) -> bool:
        return session in self._sessions

    @property
    def reserved_positions(self) -> int:
        """Positions of the pages that sessions hold."""
        return _positions(self._units - self._free_units - self._idle_units)

    @property
    def cached_positions(self) -> int:
        """Positions of the cached pages that no session holds."""
        return _positions(self._idle_units)

    @property
    def _idle_units(self) -> int:
        return sum(self._taken_units[entry.page] for entry in self._idle)

    def open(self, session: SessionId, positions: int, prefix: Prefix | None) -> Mapping[KvCompatibilityKey, int]:
        """Reserve pages, pin the cached ones, and return how many positions these are.

        Raises EngineFull while there is no room, EngineError for an invalid request.
        """
        if session in self._sessions:
            raise EngineError(f"session {session.job}/{session.stage} is open already")
        if not 1 <= positions <= self._info.max_positions:
            raise EngineError(f"a session has 1 to {self._info.max_positions} positions, not {positions}")
        found = self._find(prefix)
        _pin(found, 1)
        try:
            pages = self._allocate(positions)
        except EngineFull:
            _pin(found, -1)
            if not found:
                raise
            found = {}  # serving the session is worth more than the cache
            pages = self._allocate(positions)
        self._sessions[session] = _SessionPages(positions, pages, prefix, found)
        return {key: len(entries) * self._info.page_positions(key.variant) for key, entries in found.items()}

    def begin(self, session: SessionId, options: SessionOptions) -> KvReservation:
        """Unpin the pages found, but for those with the chosen KV key, which the session copies at once.

        Pages are given back where each holds more positions in the session's variant than was planned for.
        """
        holding = self._of(session)
        if holding.begun:
            raise EngineError(f"session {session.job}/{session.stage} has begun already")
        if self._info.part(options.blocks).is_last and options.sampling is None:
            raise EngineError("the last span samples tokens: a session on it needs sampling options")
        wanted = holding.pinned.get(options.kv_key, []) if options.prefix_cache else []
        taken = list(takewhile(self._is_cached, wanted))
        _pin(holding.pinned, -1)
        holding.pinned = {}
        self._touch(taken)
        holding.begun = True
        size = holding.page_positions = self._info.page_positions(options.variant)
        needed = -(-holding.positions // size)
        self._release(holding.pages[needed:])
        holding.pages = holding.pages[:needed]
        holding.kv_key = options.kv_key if options.prefix_cache else None
        page_units = self._page_units.get(options.variant.kv, _PAGE_UNITS)
        for page in holding.pages:
            self._free_units += self._taken_units[page] - page_units
            self._taken_units[page] = page_units
        copied = tuple(entry.page for entry in taken[: len(holding.pages)])
        return KvReservation(
            positions=holding.positions,
            pages=holding.pages,
            copied=copied,
            dropped=self.take_dropped(),
            page_positions=size,
        )

    def held_positions(self, session: SessionId) -> int:
        """Return how many positions of the usual type take the memory that a session's pages take."""
        return _positions(sum(self._taken_units[page] for page in self._of(session).pages))

    def take_dropped(self) -> tuple[int, ...]:
        """Return the pages whose content was given up since the last call, for the engine to forget."""
        dropped = tuple(sorted(self._dropped))
        self._dropped.clear()
        return dropped

    def drop_again(self, pages: Iterable[int]) -> None:
        """Have the next session tell the engine of pages given up: the one that should have was withdrawn."""
        self._dropped.update(page for page in pages if page not in self._taken_units)

    def rewind(self, session: SessionId, position: int) -> None:
        """Drop the session's cached pages that reach beyond `position`: they are about to be overwritten."""
        holding = self._of(session)
        for number in [number for number in holding.entries if (number + 1) * holding.page_positions > position]:
            self._drop(holding.entries.pop(number))

    def advance(self, session: SessionId, length: int) -> None:
        """Put the prompt's whole pages into the cache, now that `length` positions are calculated."""
        holding = self._of(session)
        if holding.prefix is None or holding.kv_key is None:
            return
        group = (holding.prefix.namespace, holding.kv_key)
        cached = self._cached(group)
        whole = min(length // holding.page_positions, len(holding.pages))
        for number, name in enumerate(islice(self._names(holding.prefix, holding.kv_key), whole)):
            if name not in cached:
                cached = self._index.setdefault(group[0], {}).setdefault(group[1], {})
                cached[name] = holding.entries[number] = _Entry(holding.pages[number], group, name, session, holding)

    def uncache(self, session: SessionId) -> None:
        """Take a session's pages out of the prefix cache, and put none into it any more; an unknown one is ignored."""
        if (holding := self._sessions.get(session)) is not None:
            self.rewind(session, 0)
            holding.kv_key = None

    def rename(self, session: SessionId, successor: SessionId) -> None:
        """Give a session another id. Raises EngineError where the one is not open, or the other is."""
        if successor in self._sessions:
            raise EngineError(f"session {successor.job}/{successor.stage} is open already")
        holding = self._of(session)
        self._sessions[successor] = self._sessions.pop(session)
        for entry in holding.entries.values():
            entry.session = successor

    def close(self, session: SessionId, *, keep: bool = True) -> None:
        """Free a session; an unknown one is ignored. `keep`: whether its pages stay in the prefix cache."""
        holding = self._sessions.pop(session, None)
        if holding is None:
            return
        _pin(holding.pinned, -1)
        if not keep:
            for entry in holding.entries.values():
                self._drop(entry)
            holding.entries.clear()
        for entry in holding.entries.values():
            entry.session = None
            self._closed[holding] += 1
        # The end of a prompt is evicted before its start, without which it cannot be used.
        self._touch(holding.entries[number] for number in sorted(holding.entries))
        self._release(set(holding.pages) - {entry.page for entry in holding.entries.values()})

    def expire(self) -> bool:
        """Evict the cached pages that have been unused for EXPIRY_ROUNDS calls; return whether there were any."""
        for entry in self._idle:
            entry.idle_rounds += 1
        expired = [entry for entry in self._idle if entry.idle_rounds > EXPIRY_ROUNDS and not entry.pins]
        for entry in expired:
            self._evict(entry)
        return bool(expired)

    def _of(self, session: SessionId) -> _SessionPages:
        try:
            return self._sessions[session]
        except KeyError:
            raise SessionNotOpen(session) from None

    def _find(self, prefix: Prefix | None) -> dict[KvCompatibilityKey, list[_Entry]]:
        """Return the cached pages from the start of a prompt up to the first gap, by KV key."""
        if prefix is None:
            return {}
        found = {
            kv_key: [cached[name] for name in takewhile(cached.__contains__, self._names(prefix, kv_key))]
            for kv_key, cached in self._index.get(prefix.namespace, {}).items()
        }
        return {kv_key: entries for kv_key, entries in found.items() if entries}

    def _names(self, prefix: Prefix, kv_key: KvCompatibilityKey) -> Iterator[bytes]:
        """Return the hashes of a prompt's pages with a KV key: of two in one, that of the second covers both."""
        every = self._info.page_positions(kv_key.variant) // PAGE_POSITIONS
        return islice(prefix, every - 1, None, every)

    def _is_cached(self, entry: _Entry) -> bool:
        return self._cached(entry.group).get(entry.hash) is entry

    def _cached(self, group: _Group) -> dict[bytes, _Entry]:
        """Return the cached pages of a group; of one without any a dictionary that is not kept."""
        namespace, kv_key = group
        return self._index.get(namespace, {}).get(kv_key, {})

    def _touch(self, entries: Iterable[_Entry]) -> None:
        """Mark entries as just used, the first of them last."""
        for entry in reversed(list(entries)):
            if entry.session is None:
                self._idle.pop(entry, None)
                self._idle[entry] = None
                entry.idle_rounds = 0

    def _allocate(self, positions: int) -> tuple[int, ...]:
        self._free_sequence()
        count = -(-positions // PAGE_POSITIONS)
        evictable = [entry for entry in self._idle if entry.pins == 0]
        needed = count * _PAGE_UNITS
        free = self._free_units + sum(self._taken_units[entry.page] for entry in evictable)
        if needed > free:
            raise EngineFull(
                f"no KV memory for {positions} positions: {_positions(free)} of {self._info.kv_positions} are free on "
                f"this span"
            )
        for entry in takewhile(lambda _: needed > self._free_units, evictable):
            self._evict(entry)
        start = self._free.find(_FREE * count)
        if start >= 0:
            pages = tuple(range(start, start + count))
        else:
            pages = tuple(islice((page for page, free in enumerate(self._free) if free), count))
        for page in pages:
            self._free[page] = 0
            self._taken_units[page] = _PAGE_UNITS
        self._free_units -= needed
        return pages

    def _free_sequence(self) -> None:
        """Evict all pages of closed sessions, least recently used first, until there is a sequence for another one."""
        limit = self._info.max_sequences
        while limit is not None and len(self._sessions) + len(self._closed) >= limit:
            pinned = {entry.origin for entry in self._idle if entry.pins}
            origin = next((entry.origin for entry in self._idle if entry.origin not in pinned), None)
            if origin is None:
                raise EngineFull(f"this span serves {limit} sessions at once, and as many are open")
            for entry in [entry for entry in self._idle if entry.origin is origin]:
                self._evict(entry)

    def _release(self, pages: Iterable[int]) -> None:
        for page in pages:
            self._dropped.add(page)
            self._free[page] = 1
            self._free_units += self._taken_units.pop(page)

    def _evict(self, entry: _Entry) -> None:
        self._drop(entry)

    def _drop(self, entry: _Entry) -> None:
        """Remove a page from the cache, and free it if no session holds it."""
        namespace, kv_key = entry.group
        by_key = self._index[namespace]
        del by_key[kv_key][entry.hash]
        if not by_key[kv_key]:
            del by_key[kv_key]
        if not by_key:
            del self._index[namespace]
        if entry.session is None:
            del self._idle[entry]
            self._closed[entry.origin] -= 1
            if not self._closed[entry.origin]:
                del self._closed[entry.origin]
            self._release([entry.page])


def _positions(units: int) -> int:
    return units * PAGE_POSITIONS // _PAGE_UNITS


def _pin(found: Mapping[KvCompatibilityKey, Iterable[_Entry]], count: int) -> None:
    for entries in found.values():
        for entry in entries:
            entry.pins += count


def check_slice(info: SpanInfo, rows: SliceInput, *, cached: int, reserved: int) -> None:
    """Raise BadRows unless the rows follow the `cached` positions of their session and fit into the `reserved` ones.

    `info`: of the part of the span that the session runs.
    """
    count = rows.tensor.rows
    if count < 1 or not 0 <= rows.draws <= count:
        raise BadRows(f"a slice of {count} rows cannot draw {rows.draws} tokens")
    if rows.drafts and len(rows.drafts) != rows.draws - 1:
        raise BadRows(f"{len(rows.drafts)} drafts do not belong to {rows.draws} tokens to draw")
    if not 0 <= rows.position <= cached:
        raise BadRows(f"rows from position {rows.position} on do not follow the {cached} that are cached")
    if rows.position + count > reserved:
        raise BadRows(f"{count} rows at position {rows.position} exceed the {reserved} positions reserved")
    if info.is_first:
        if rows.tensor.dtype is not DType.INT32 or len(rows.tensor.shape) != 1:
            raise BadRows(f"the first span takes token ids, not {rows.tensor.dtype}{list(rows.tensor.shape)}")
    elif rows.tensor.dtype not in HIDDEN_DTYPES or rows.tensor.shape[1:] != (info.hidden_size,):
        raise BadRows(
            f"this span takes hidden states of {info.hidden_size} elements, "
            f"not {rows.tensor.dtype}{list(rows.tensor.shape)}"
        )
