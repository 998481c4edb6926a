"""Identifiers: peers, models, jobs, sessions and ranges of blocks.

Identifiers are text in canonical form, each with a type of its own. The `parse_*` functions check text from outside;
they raise ValueError with one line for the user.
"""

import re
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from typing import NamedTuple, NewType

import base58

from protocol.limits import MAX_BLOCKS

PeerId = NewType("PeerId", str)
"""A libp2p peer id in base58btc: the identity multihash of an Ed25519 public key, `12D3KooW…`."""

ModelId = NewType("ModelId", str)
"""The sha256 of a model's manifest, 64 lower-case hexadecimal digits."""

JobId = NewType("JobId", str)
"""16 bytes, 32 lower-case hexadecimal digits, chosen by the coordinator; see `job_id_of`."""

_MODEL_ID = re.compile(r"[0-9a-f]{64}")
_BLOCK_RANGE = re.compile(r"([0-9]{1,4})-([0-9]{1,4})")

# libp2p peer-ids specification: an Ed25519 key is small enough to be inlined, so the id is the identity multihash
# (0x00, length 0x24) of the protobuf PublicKey{Type: Ed25519 (08 01), Data: 32 bytes (12 20)}.
_ED25519_PREFIX = bytes.fromhex("002408011220")
_ED25519_KEY_BYTES = 32

JOB_NONCE_BYTES = 8
"""How many bytes of a job id are random."""

# Base58 is arithmetic on long integers, and all records name the same few peers: a quarter of an observation's check.
_b58encode = lru_cache(maxsize=4096)(base58.b58encode)
_b58decode = lru_cache(maxsize=4096)(base58.b58decode)


class SessionId(NamedTuple):
    """A job's state on one stage. The stage number is part of it, because one peer may serve two stages of a job.

    Stages count from 0 along the route; the coordinator, which receives the tokens, has the number after the last.
    """

    job: JobId
    stage: int

    def __str__(self) -> str:
        return f"{self.job}/{self.stage}"


def job_id_of(coordinator: PeerId, nonce: bytes) -> JobId:
    """Return the job id that a coordinator makes with random bytes: a digest in it shows whose it is.

    Every stage learns the job id of its route, and could else open sessions under it before the coordinator does.
    """
    digest = sha256(b"metaswarm/job/" + nonce + coordinator.encode()).digest()
    return JobId((nonce + digest)[:16].hex())


def is_job_of(job: JobId, coordinator: PeerId) -> bool:
    """Return whether a job id was made by this coordinator; those of earlier versions show none."""
    return job == job_id_of(coordinator, bytes.fromhex(job)[:JOB_NONCE_BYTES])


@dataclass(frozen=True, slots=True, order=True)
class BlockRange:
    """Contiguous transformer blocks `start` to `end`, end exclusive; never empty."""

    start: int
    end: int

    def __post_init__(self) -> None:
        """Raise ValueError unless 0 <= start < end <= MAX_BLOCKS."""
        if not 0 <= self.start < self.end <= MAX_BLOCKS:
            raise ValueError(
                f"{self.start}-{self.end} is not a range of blocks: expected 0 <= start < end <= {MAX_BLOCKS}"
            )

    def __len__(self) -> int:
        return self.end - self.start

    def __contains__(self, block: int) -> bool:
        return self.start <= block < self.end

    def holds(self, other: "BlockRange") -> bool:
        """Return whether all blocks of another range are in this one."""
        return self.start <= other.start and other.end <= self.end

    def overlap(self, other: "BlockRange") -> "BlockRange | None":
        """Return the blocks that are in both ranges; None if there are none."""
        start, end = max(self.start, other.start), min(self.end, other.end)
        return BlockRange(start, end) if start < end else None

    def __str__(self) -> str:
        return f"{self.start}-{self.end}"


@dataclass(frozen=True, slots=True, order=True)
class Stage:
    """A peer that runs a range of blocks: one part of a job's route, of an offer, of a placement plan."""

    peer: PeerId
    blocks: BlockRange

    def __str__(self) -> str:
        return f"{self.peer}:{self.blocks}"


def peer_id_from_public_key(public_key: bytes) -> PeerId:
    """Return the peer id of an Ed25519 public key (32 raw bytes)."""
    if len(public_key) != _ED25519_KEY_BYTES:
        raise ValueError(f"an Ed25519 public key has {_ED25519_KEY_BYTES} bytes, not {len(public_key)}")
    return PeerId(_b58encode(_ED25519_PREFIX + public_key).decode("ascii"))


def public_key_of(peer: PeerId) -> bytes:
    """Return the Ed25519 public key (32 raw bytes) inside a peer id."""
    return _b58decode(peer)[len(_ED25519_PREFIX) :]


def parse_peer_id(text: str) -> PeerId:
    """Return `text` as a peer id; only ids of Ed25519 keys are supported."""
    if len(text) > 64:
        raise ValueError("a peer id has at most 64 characters")
    try:
        raw = _b58decode(text)
    except ValueError:
        raise ValueError(f"{text!r} is not a peer id: not base58") from None
    if len(raw) != len(_ED25519_PREFIX) + _ED25519_KEY_BYTES or not raw.startswith(_ED25519_PREFIX):
        raise ValueError(f"{text!r} is not a peer id of an Ed25519 key")
    # The decoder ignores trailing white space; a peer has only one id.
    if _b58encode(raw).decode("ascii") != text:
        raise ValueError(f"{text!r} is not a peer id: not in canonical form")
    return PeerId(text)


def parse_model_id(text: str) -> ModelId:
    """Return `text` as a model id."""
    if _MODEL_ID.fullmatch(text) is None:
        raise ValueError(f"{text[:80]!r} is not a model id: expected 64 hexadecimal digits")
    return ModelId(text)


def parse_block_range(text: str) -> BlockRange:
    """Return `START-END`, end exclusive, as a range of blocks."""
    match = _BLOCK_RANGE.fullmatch(text)
    if match is None:
        raise ValueError(f"{text[:80]!r} is not a range of blocks: expected START-END, for example 0-15, end exclusive")
    return BlockRange(int(match[1]), int(match[2]))
