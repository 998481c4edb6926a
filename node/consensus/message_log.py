"""The minutes of one chain: the signed records that were heard of late, and those that prove what stands.

They are what is handed to others, who need not trust us for it. Bounded: of each kind so many are held of an epoch, and
epochs that are over go.
"""

import hashlib
from collections import Counter
from collections.abc import Collection
from typing import Final, NamedTuple

from protocol.chains import SHORT_ID_BYTES
from protocol.consensus import (
    CommitRecord,
    EquivocationRecord,
    RevealRecord,
    Said,
    SignatureRecord,
    StatementRecord,
    contradicts,
    offender_of,
)
from protocol.identity import PeerId
from protocol.limits import MAX_HAVE

MAX_OF_MEMBERS: Final = {CommitRecord: 576, RevealRecord: 576, StatementRecord: 48, SignatureRecord: 448}
MAX_OF_OTHERS: Final = {CommitRecord: 192, RevealRecord: 192, StatementRecord: 16, SignatureRecord: 192}
"""Records of one epoch that are held. An epoch counts at most 304 contributions and has 5 proposals and 128 signers.
Identities cost nothing: however many strangers speak, there is room for what members say."""

MAX_OFFENCES: Final = 256

MAX_EVIDENCE: Final = 2048
"""Statements whose signatures are held, the newest ones."""


MAX_SIGNATURES: Final = 512
"""Held of a statement. A committee is smaller; who is in it may not be known yet."""


class Contradiction(NamedTuple):
    """Two records of one peer that cannot both stand."""

    first: Said
    second: Said


class MessageLog:
    """What was said in one chain, and who can prove it."""

    def __init__(self) -> None:
        self.statements: dict[bytes, Said] = {}
        """By the statement's own digest, which is for the caller to know."""
        self.signatures: dict[bytes, dict[PeerId, Said]] = {}
        """By statement, then by signer."""
        self.offences: dict[PeerId, Said] = {}
        self._recent: dict[bytes, Said] = {}
        self._said_once: dict[tuple[object, ...], Said] = {}
        self._counts: Counter[tuple[int, type, bool]] = Counter()

    def add(self, said: Said, current_epoch: int, *, is_member: bool = True) -> Contradiction | None:
        """Take in a record; return what it contradicts of what its signer said before.

        Of statements and signatures also old ones are taken, as evidence; of all others those of the current epoch, the
        one before and the one after: clocks differ.
        """
        body = said.body
        if isinstance(body, EquivocationRecord):
            if len(self.offences) < MAX_OFFENCES:
                self.offences.setdefault(offender_of(body), said)
            return None
        contradicted = self._contradicted(said)
        is_recent = abs(body.epoch - current_epoch) <= 1
        if is_recent and said.id not in self._recent and not self.is_full(said, is_member=is_member):
            self._recent[said.id] = said
            self._counts[body.epoch, type(body), is_member] += 1
        if isinstance(body, SignatureRecord):
            held = self.signatures.setdefault(body.statement, {})
            if len(held) < MAX_SIGNATURES:
                held.setdefault(said.peer, said)
        return contradicted

    @property
    def is_overfull(self) -> bool:
        """Whether so much evidence is held that it is time to prune: some peer may never end to tell of the past."""
        return max(len(self.statements), len(self.signatures)) > 2 * MAX_EVIDENCE

    def add_statement(self, statement: bytes, said: Said) -> None:
        """Keep the record of a statement under its digest."""
        self.statements.setdefault(statement, said)

    def is_full(self, said: Said, *, is_member: bool) -> bool:
        """Whether of this record's kind and epoch no more are held, of members or of others."""
        body = said.body
        if isinstance(body, EquivocationRecord):
            return len(self.offences) >= MAX_OFFENCES
        bounds = MAX_OF_MEMBERS if is_member else MAX_OF_OTHERS
        return self._counts[body.epoch, type(body), is_member] >= bounds[type(body)]

    def prune(self, current_epoch: int, needed: Collection[bytes]) -> None:
        """Forget epochs that are over, and evidence of statements that are not `needed`."""
        oldest = current_epoch - 1
        self._recent = {key: said for key, said in self._recent.items() if _epoch(said) >= oldest}
        self._said_once = {key: said for key, said in self._said_once.items() if _epoch(said) >= oldest}
        self._counts = Counter({key: count for key, count in self._counts.items() if key[0] >= oldest})
        for held in (self.statements, self.signatures):
            for statement in [each for each in held if each not in needed][: max(0, len(held) - MAX_EVIDENCE)]:
                del held[statement]

    def recent(self) -> dict[bytes, Said]:
        """Return what was heard of late, by short ids, ascending."""
        found = {said.id[:SHORT_ID_BYTES]: said for said in (*self._recent.values(), *self.offences.values())}
        return {key: found[key] for key in sorted(found)[:MAX_HAVE]}

    def digest(self) -> bytes:
        """Return one digest of what was heard of late."""
        return hashlib.sha256(b"".join(self.recent())).digest()

    def _contradicted(self, said: Said) -> Contradiction | None:
        match said.body:
            case SignatureRecord() as body:
                key: tuple[object, ...] = (said.peer, body.epoch)
            case CommitRecord() as body:
                key = (said.peer, body.epoch, body.parent)
            case _:
                return None
        first = self._said_once.get(key)
        if first is None:
            if len(self._said_once) < 4 * MAX_HAVE:
                self._said_once[key] = said
            return None
        return Contradiction(first, said) if contradicts(first, said) else None


def _epoch(said: Said) -> int:
    return -1 if isinstance(said.body, EquivocationRecord) else said.body.epoch
