"""The values of the consensus: cells, readings, commits, reveals, statements, signatures, members; and their digests.

Each field is declared with its bounds on the wire. `selector.consensus` decides with these values, and
`protocol.consensus` signs and verifies them as messages.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import fields as fields_of
from functools import cached_property
from itertools import pairwise
from typing import Annotated, Any, Final, NamedTuple, TypeAlias

from protocol import fields
from protocol.errors import RemoteProtocolError
from protocol.forms import Counter, Digest, Envelope, Hardware
from protocol.identity import PeerId, peer_id_from_public_key, public_key_of
from protocol.limits import MAX_CELL_READINGS, MAX_HARDWARE_BYTES, MAX_NAME_BYTES
from protocol.schema import LOCAL, OMIT_DEFAULT, Count, Form, Range, raw, text

Plain: TypeAlias = "int | str | bytes | Sequence[Plain]"

VALUE_SCALE: Final = 1_000_000
"""Readings are whole millionths of a natural logarithm, so that medians are the same on every machine."""

MAX_READING: Final = 20 * VALUE_SCALE
"""The largest reading, either sign."""

MAX_EPOCH: Final = (1 << 32) - 1
MAX_COMMITTED: Final = 128
"""Observations named by one commit."""

MAX_READINGS: Final = 8
"""Readings in one reveal."""

NONCE_BYTES: Final = 32

MAX_CONTRIBUTIONS: Final = 336
"""Contributions to one statement: of the selected members, of candidates, and of newcomers."""

MAX_JOINED: Final = 64
"""Peers that start a chain, or members that join in one epoch."""

MAX_CANDIDATES: Final = 32
"""Newcomers whose measurements are audited, and who are not members yet."""

MAX_INCLUSION_BYTES: Final = 48
"""An inclusion list: a bit for every peer whose contribution is expected, of which there are at most 328."""

MAX_REMAINING_BYTES: Final = 2048
"""A bit for every former member, where the chain restarts."""

MAX_LEFT: Final = 48
MAX_EXPELLED: Final = 8
"""Members that leave, and that are expelled, in one epoch; the others go in the next. It keeps a statement small."""


def load_peer(value: object, what: str) -> PeerId:
    """Return a peer, which travels as its public key."""
    return fields.peer_id(peer_id_from_public_key(fields.raw(value, fields.SHA256_BYTES, what)), what)


def _load_cell(values: Sequence[object], what: str) -> "Cell":
    hardware, workload, method = values
    return Cell(
        fields.name(hardware, MAX_HARDWARE_BYTES, f"{what} hardware"),
        fields.name(workload, MAX_NAME_BYTES, f"{what} workload"),
        fields.name(method, MAX_NAME_BYTES, f"{what} method"),
    )


def _load_value(value: object, what: str) -> int:
    return fields.integer(value, -MAX_READING, MAX_READING, f"{what} value")


def _load_inclusion(value: object, what: str) -> bytes:
    if type(value) is not bytes or len(value) > MAX_INCLUSION_BYTES:
        raise RemoteProtocolError(f"{what} is not at most {MAX_INCLUSION_BYTES} bytes")
    return value


def _load_remaining(value: object, what: str) -> bytes:
    if type(value) is not bytes or len(value) > MAX_REMAINING_BYTES:
        raise RemoteProtocolError(f"{what} is not at most {MAX_REMAINING_BYTES} bytes")
    return value


def _load_reading(value: object, what: str) -> "Reading":
    *cell, measured = fields.tuple_of(value, 4, what)
    return Reading(_load_cell(cell, what), _load_value(measured, what))


def _load_measured(value: object, what: str) -> "tuple[Cell, CellReadings]":
    *cell, epoch, readings = fields.tuple_of(value, 5, what)
    pairs = [fields.tuple_of(pair, 2, what) for pair in fields.array(readings, MAX_CELL_READINGS, f"{what} readings")]
    return _load_cell(cell, what), CellReadings(
        fields.integer(epoch, 0, MAX_EPOCH, f"{what} epoch"),
        tuple(PeerReading(load_peer(key, what), _load_value(measured, what)) for key, measured in pairs),
    )


def _dump_measured(value: "tuple[Cell, CellReadings]") -> list[object]:
    cell, (epoch, readings) = value
    return [*cell, epoch, [[public_key_of(peer), measured] for peer, measured in readings]]


def _require_ascending(values: Sequence[Any], what: str) -> None:
    if any(not before < after for before, after in pairwise(values)):
        raise RemoteProtocolError(f"{what} do not ascend")


Epoch = Annotated[int, Range(0, MAX_EPOCH)]
PeerKey = Annotated[PeerId, Form(load_peer, public_key_of)]
Signer = Annotated[PeerId, LOCAL]
"""The signer does not travel: the envelope names it."""


class Cell(NamedTuple):
    """What one measurement is of: a method in a context, which is a workload on a hardware class."""

    hardware: str
    workload: str
    method: str


class Reading(NamedTuple):
    """One peer's measurement of a cell: the logarithm of the ratio of its cost to the baseline's on the same route.

    Ratios are comparable between machines, absolute times are not. `value` is in units of 1 / VALUE_SCALE.
    """

    cell: Cell
    value: int


@dataclass(frozen=True)
class Commit:
    """A peer's commitment for an epoch: to readings that stay hidden until the reveal, and to published observations.

    `parent`: the statement whose beacon selected the cells. `hardware`: the class of a newcomer's hardware, which it
    states once; empty from then on. `commitment`: see `commitment_of`. `observations`: ids, ascending, none of which
    this peer named in an earlier commit on this chain.
    """

    chain: Digest
    epoch: Epoch
    parent: Digest
    peer: Signer
    hardware: Annotated[str, text(MAX_HARDWARE_BYTES)]
    commitment: Digest
    observations: Annotated[tuple[Digest, ...], Count(MAX_COMMITTED)] = ()

    @cached_property
    def id(self) -> Digest:
        """The digest of all fields, in their order."""
        return _digest_of_fields("commit", self)

    def check(self) -> None:
        """Raise RemoteProtocolError where ids are not a set."""
        _require_ascending(self.observations, "commit observations")


@dataclass(frozen=True)
class Reveal:
    """The readings that open a commit, ascending by cell.

    `inclusion`: of a member of the committee, which commits it holds; see `selector.consensus.inclusion`.
    """

    chain: Digest
    epoch: Epoch
    peer: Signer
    nonce: Annotated[bytes, raw(NONCE_BYTES)]
    readings: Annotated[
        tuple[Annotated[Reading, Form(_load_reading, lambda reading: [*reading.cell, reading.value])], ...],
        Count(MAX_READINGS),
    ]
    inclusion: Annotated[bytes, Form(_load_inclusion), OMIT_DEFAULT] = b""

    @cached_property
    def commitment(self) -> Digest:
        """The commitment that it opens."""
        return commitment_of(self.peer, self.nonce, self.readings)

    def check(self) -> None:
        """Raise RemoteProtocolError where cells are not a set."""
        _require_ascending([reading.cell for reading in self.readings], "reveal readings")


@dataclass(frozen=True)
class Statement:
    """The agreed result of an epoch, as a member of the committee proposes it.

    `commits`: the contributions that count, ascending: digests of commit and inclusion list. `joined`, `left`,
    `expelled`: the changes to the list of members, ascending, so that it is known without the contributions. A
    statement that starts the chain lists all its members as joined; one that restarts it names those former members
    that go on in `remaining`, a bit for each, as in an inclusion list. `beacon`: draws the next epoch's committee and
    cells; it follows from the nonces in the contributions, so that a proposer cannot choose it. `set_digest` covers all
    contributions so far, `table_digest` the agreed table, `state_digest` the whole state from which the next epoch is
    computed.
    """

    chain: Digest
    epoch: Epoch
    parent: Digest
    proposer: Signer
    commits: Annotated[tuple[Digest, ...], Count(MAX_CONTRIBUTIONS)]
    joined: Annotated[tuple[PeerKey, ...], Count(MAX_JOINED)]
    left: Annotated[tuple[PeerKey, ...], Count(MAX_LEFT)]
    expelled: Annotated[tuple[PeerKey, ...], Count(MAX_EXPELLED)]
    beacon: Digest
    set_digest: Digest
    table_digest: Digest
    state_digest: Digest
    remaining: Annotated[bytes, Form(_load_remaining), OMIT_DEFAULT] = b""

    @cached_property
    def id(self) -> Digest:
        """The digest of all fields, in their order: what peers sign."""
        return _digest_of_fields("statement", self)

    def check(self) -> None:
        """Raise RemoteProtocolError where commits or peers are not a set, or members are named in two ways."""
        if self.remaining and (self.joined or self.left):
            raise RemoteProtocolError("the statement names members that remain, and others that join or leave")
        for key in ("commits", "joined", "left", "expelled"):
            _require_ascending(getattr(self, key), f"statement {key}")


@dataclass(frozen=True, slots=True)
class Signature:
    """A peer's vote for a statement; a peer has one vote in an epoch."""

    chain: Digest
    epoch: Epoch
    peer: Signer
    statement: Digest


@dataclass(frozen=True, slots=True)
class EquivocationProof:
    """Two envelopes signed by one peer that contradict each other; any peer may publish the proof."""

    chain: Digest
    first: Envelope
    second: Envelope


class Member(NamedTuple):
    """A member of the consensus, or a candidate, with its reputation.

    `hardware`: the class that it stated when it came. `agreed`, `deviated`: how often its readings supported the agreed
    value and how often not, in the fixed point of `selector.consensus.reputation`, with decay. `absences`: epochs in a
    row in which it was expected and did not contribute. `since`: the epoch in which it came, or in which something on
    the hardware of a candidate was compared last. `idle`: epochs in a row in which a candidate read nothing, though
    something that it was to read was compared.
    """

    peer: PeerKey
    hardware: Hardware
    agreed: Counter = 0
    deviated: Counter = 0
    absences: Epoch = 0
    since: Epoch = 0
    idle: Epoch = 0


class PeerReading(NamedTuple):
    """One peer's reading of a given cell."""

    peer: PeerId
    value: int


class CellReadings(NamedTuple):
    """The readings of one cell, ascending by peer, and the epoch in which it was last selected."""

    epoch: int
    readings: tuple[PeerReading, ...]


MeasuredCell = Annotated[tuple[Cell, CellReadings], Form(_load_measured, _dump_measured)]


def genesis_of(swarm: bytes, model: str, rules: str) -> Digest:
    """Return the id of a chain, which is the parent of its first statement.

    `rules`: everything that peers must have in common to agree, such as the length of an epoch.
    """
    return digest_of("genesis", swarm, model, rules)


def commitment_of(peer: PeerId, nonce: bytes, readings: Sequence[Reading]) -> Digest:
    """Return the commitment to readings. It covers the peer, so that nobody can copy another's commitment."""
    return digest_of("commitment", peer, nonce, readings)


def digest_of(*parts: Plain) -> Digest:
    """Return the sha256 of nested sequences of integers, text and bytes, encoded without ambiguity."""
    hashed = hashlib.sha256()
    _feed(hashed, parts)
    return hashed.digest()


def _digest_of_fields(kind: str, value: Commit | Statement) -> Digest:
    return digest_of(kind, *(getattr(value, field.name) for field in fields_of(value)))


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
