"""The values of the consensus: cells, readings, commitments, members and statements, each with its digest."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final, NamedTuple, TypeAlias

Digest: TypeAlias = bytes
"""A sha256, 32 bytes."""

Plain: TypeAlias = "int | str | bytes | Sequence[Plain]"

VALUE_SCALE: Final = 1_000_000
"""Readings are whole millionths of a natural logarithm, so that medians are the same on every machine."""

MAX_VALUE: Final = 20 * VALUE_SCALE
"""The largest reading, either sign."""


class Cell(NamedTuple):
    """One thing to measure: a method in a context, which is a workload on a class of hardware."""

    hardware: str
    workload: str
    method: str


class Reading(NamedTuple):
    """What a peer measured: the logarithm of the ratio of a cell's cost to the baseline's on the same route.

    Ratios travel between machines, absolute times do not. `value` counts in 1 / VALUE_SCALE.
    """

    cell: Cell
    value: int


@dataclass(frozen=True)
class Commit:
    """A peer's word for an epoch: what it measured, hidden, and which observations of its own it has given out.

    `parent`: the statement whose beacon told it what to measure. `commitment`: what `commitment_of` makes of the
    readings and a nonce. `observations`: ids, ascending, none of which was named by it before on this chain.
    """

    chain: Digest
    epoch: int
    parent: Digest
    peer: str
    hardware: str
    commitment: Digest
    observations: tuple[bytes, ...] = ()

    @cached_property
    def id(self) -> Digest:
        """The digest of everything it says."""
        parts = (self.chain, self.epoch, self.parent, self.peer, self.hardware, self.commitment, self.observations)
        return digest_of("commit", *parts)


@dataclass(frozen=True)
class Reveal:
    """What was committed to; ascending by cell."""

    chain: Digest
    epoch: int
    peer: str
    nonce: bytes
    readings: tuple[Reading, ...]

    @cached_property
    def commitment(self) -> Digest:
        """The commitment that it opens."""
        return commitment_of(self.peer, self.nonce, self.readings)


@dataclass(frozen=True)
class Statement:
    """What the swarm agrees on for an epoch: which contributions count, and what follows from them.

    `commits`: ids of the commits that were revealed and count, ascending. `joined`, `left`, `expelled`: how the list of
    members changes, ascending, so that it is known without the contributions; a statement that founds the chain, or
    founds it again, lists all its members as joined. `set_digest` names all contributions up
    to now, `table_digest` the agreed table, `state_digest` everything that the next epoch is computed from.
    """

    chain: Digest
    epoch: int
    parent: Digest
    proposer: str
    commits: tuple[Digest, ...]
    joined: tuple[str, ...]
    left: tuple[str, ...]
    expelled: tuple[str, ...]
    set_digest: Digest
    table_digest: Digest
    state_digest: Digest

    @cached_property
    def id(self) -> Digest:
        """The digest of everything it says; peers sign it, and the next epoch's beacon comes of it."""
        return digest_of(
            "statement",
            self.chain,
            self.epoch,
            self.parent,
            self.proposer,
            self.commits,
            self.joined,
            self.left,
            self.expelled,
            self.set_digest,
            self.table_digest,
            self.state_digest,
        )


class Signature(NamedTuple):
    """A peer's vote for a statement of an epoch, of which it may have one only."""

    epoch: int
    peer: str
    statement: Digest


def genesis_of(swarm: bytes, model: str, rules: str) -> Digest:
    """Return the name of a chain, and the parent of its first statement.

    `rules`: whatever peers must have in common to agree, such as the length of an epoch.
    """
    return digest_of("genesis", swarm, model, rules)


def commitment_of(peer: str, nonce: bytes, readings: Sequence[Reading]) -> Digest:
    """Return the commitment to readings. With the peer in it, nobody can commit to another's readings unseen."""
    return digest_of("commitment", peer, nonce, readings)


def digest_of(*parts: Plain) -> Digest:
    """Return the sha256 of nested sequences of integers, text and bytes; different values never read alike."""
    hashed = hashlib.sha256()
    _feed(hashed, parts)
    return hashed.digest()


def _feed(hashed: "hashlib._Hash", value: Plain) -> None:
    if isinstance(value, int):
        data = b"%d" % value
        hashed.update(b"i%d:" % len(data) + data)
    elif isinstance(value, str):
        data = value.encode()
        hashed.update(b"s%d:" % len(data) + data)
    elif isinstance(value, bytes):
        hashed.update(b"b%d:" % len(value) + value)
    else:
        hashed.update(b"l%d:" % len(value))
        for item in value:
            _feed(hashed, item)
