"""Inclusion lists: which of the expected commits a member of the committee holds, signed with its reveal.

A contribution that more than a third of the committee lists cannot be left out of a statement, and only these lists
prove that a peer was absent: so no proposer decides whose contribution counts. A list is a bit for each expected peer,
in ascending order, the first one in the lowest bit of the first byte.
"""

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Sequence

from protocol.identity import PeerId


def pack(held: Collection[PeerId], expected: Sequence[PeerId]) -> bytes:
    """Return the inclusion list of peers whose commits are held."""
    bits = sum(1 << number for number, peer in enumerate(expected) if peer in held)
    return bits.to_bytes(_size(expected), "little")


def unpack(packed: bytes, expected: Sequence[PeerId]) -> set[PeerId]:
    """Return the peers whose bits are set. Raises ValueError for a list of another size."""
    bits = int.from_bytes(packed, "little")
    if len(packed) != _size(expected) or bits >> len(expected):
        raise ValueError("the list is of another size")
    return {peer for number, peer in enumerate(expected) if bits >> number & 1}


def count(lists: Iterable[bytes], expected: Sequence[PeerId]) -> tuple[Counter[PeerId], int]:
    """Return how many of the lists name each peer, and how many lists there are. Lists of another size do not count."""
    named: Counter[PeerId] = Counter()
    valid = [each for each in lists if each and len(each) == _size(expected)]
    for each, times in Counter(valid).items():
        bits = int.from_bytes(each, "little")
        named.update({peer: times for number, peer in enumerate(expected) if bits >> number & 1})
    return named, len(valid)


def unite(lists: Iterable[tuple[PeerId, bytes]], expected: Sequence[PeerId]) -> dict[PeerId, bytes]:
    """Return one list of each author, of all peers that any of its lists names. Those of another size do not count."""
    united: defaultdict[PeerId, int] = defaultdict(int)
    for author, each in lists:
        if len(each) == _size(expected):
            united[author] |= int.from_bytes(each, "little")
    return {author: bits.to_bytes(_size(expected), "little") for author, bits in united.items()}


def listed(lists: Iterable[bytes], expected: Sequence[PeerId], committee_size: int) -> set[PeerId]:
    """Return the peers that more than a third of the committee list."""
    named, _ = count(lists, expected)
    return {peer for peer, times in named.items() if is_listed(times, committee_size)}


def is_listed(times: int, committee_size: int) -> bool:
    """Return whether so many lists are more than a third of the committee: at least one of them is honest."""
    return 3 * times > committee_size


def _size(expected: Sequence[PeerId]) -> int:
    return (len(expected) + 7) // 8
