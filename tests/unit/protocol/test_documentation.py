"""docs/protocol.md is what others implement from: its tables, limits and examples must be the code's."""

import re
import struct
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from protocol import chains, limits, sync
from protocol.announcements import SpanRecord
from protocol.blobs import BlobFound, BlobInitiator, BlobRequest, BlobResponder
from protocol.canonical import decode
from protocol.codec import encode_control
from protocol.connection import JobConnection
from protocol.framing import FrameType, encode_frame
from protocol.half_duplex import HalfDuplexProtocol
from protocol.identity import BlockRange, JobId, ModelId, SessionId, job_id_of, peer_id_from_public_key
from protocol.messages import (
    Ballot,
    Begin,
    Credit,
    FailureReason,
    Hello,
    Message,
    Open,
    Ping,
    RefusalReason,
    Sampling,
    Slice,
    Step,
)
from protocol.observations import bucket_of
from protocol.reconciliation import IdCache, SetTree, digest_of
from protocol.records import seal
from protocol.states import CONNECTION_TABLE, SESSION_TABLE, Direction, Role
from protocol.tensors import DType, Tensor
from tests.unit.protocol.job_streams import MESSAGES

DOCUMENT = (Path(__file__).parents[3] / "docs" / "protocol.md").read_text()

SESSION = SessionId(JobId(bytes(range(16)).hex()), 1)
MODEL = ModelId("ab" * 32)
KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
PEER = peer_id_from_public_key(KEY.public_key().public_bytes_raw())


def documented_rows(heading: str) -> list[tuple[str, ...]]:
    """Return the cells of the table right under a heading, without its two header lines."""
    lines = DOCUMENT.split(f"{heading}\n\n", 1)[1].split("\n\n", 1)[0].splitlines()
    return [tuple(cell.strip() for cell in line.strip("|").split("|")) for line in lines[2:]]


def event(direction: Direction, message_type: type[Message]) -> str:
    return f"{'send' if direction is Direction.SENT else 'receive'} {message_type.__name__}"


@pytest.mark.parametrize("role", Role)
def test_documented_connection_states_match_the_code(role: Role) -> None:
    actual = [
        (str(state), event(direction, message_type), str(following))
        for (whose, state, message_type, direction), following in CONNECTION_TABLE.items()
        if whose is role
    ]
    assert documented_rows(f"#### Connection states of the {role}") == actual


@pytest.mark.parametrize("role", Role)
def test_documented_session_states_match_the_code(role: Role) -> None:
    actual = [
        (str(state), event(direction, message_type), str(following.next), "quiet" if following.quiet else "")
        for (whose, state, message_type, direction), following in SESSION_TABLE.items()
        if whose is role
    ]
    assert documented_rows(f"#### Session states of the {role}") == actual


@pytest.mark.parametrize(
    ("heading", "protocol"),
    [("One party speaks at a time:", chains.PROTOCOL), ("#### States of a session", sync.PROTOCOL)],
)
def test_documented_half_duplex_states_match_the_code(heading: str, protocol: HalfDuplexProtocol[Any, Any]) -> None:
    actual = [
        (str(state), str(sender), protocol.messages.name_of(kind), str(following))
        for (state, kind), (sender, following) in protocol.table.items()
    ]
    assert documented_rows(heading) == actual


def test_documented_limits_match_the_code() -> None:
    documented = {name.strip("`"): float(value) for name, value, _ in documented_rows("## Limits")}
    assert documented == {name: float(getattr(limits, name)) for name in documented}
    assert set(re.findall(r"`(MAX_[A-Z_0-9]+)`", DOCUMENT)) == set(documented)


def control(message: Hello | Open | Begin | Credit | Ping) -> bytes:
    return encode_frame(FrameType.CONTROL, encode_control(message))


def documented_fields(name: str) -> set[str]:
    """Return the fields in the table of a message."""
    table = DOCUMENT.split(f"**`{name}`**", 1)[1].split("|---|---|---|\n", 1)[1].split("\n\n", 1)[0]
    return {field for line in table.splitlines() for field in re.findall(r"^\| `(\w+)`", line)}


@pytest.mark.parametrize("name", MESSAGES)
def test_documented_fields_match_the_code(name: str) -> None:
    fields = decode(encode_control(MESSAGES[name]), max_bytes=limits.MAX_CONTROL_BYTES)
    assert isinstance(fields, dict)
    optional = {
        "open": {"downstream", "stage_facts", "request_id", "trace_parent"},
        "opened": {"table_digest"},
        "refused": {"most_positions"},
        "closed": {"countersignature"},
    }
    assert documented_fields("ping`**, **`pong" if name in {"ping", "pong"} else name) == (
        fields.keys() - {"type"} | optional.get(name, set())
    )


@pytest.mark.parametrize("reasons", [RefusalReason, FailureReason])
def test_every_reason_is_documented(reasons: type[RefusalReason | FailureReason]) -> None:
    name = "refused" if reasons is RefusalReason else "failed"
    [line] = re.findall(rf"\*\*`{name}`\*\*.*?(\| `reason` \|.*?)\n", DOCUMENT, re.DOTALL)
    assert re.findall(r"`(\w+)`:", line) == [str(reason) for reason in reasons]


def step() -> bytes:
    initiator = JobConnection(Role.INITIATOR, agent="a", window_bytes=1)
    initiator.send_hello()
    initiator.receive_data(control(Hello(agent="b", window_bytes=8)))
    tensor = Tensor(DType.FLOAT32, (1, 2), struct.pack("<ff", 1.0, -2.0))
    return b"".join(initiator.send(Step(slices=(Slice(session=SESSION, position=7, rows=1),), tensor=tensor)))


def blob_request() -> BlobRequest:
    return BlobRequest(
        sha256="ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad", offset=0, length=1 << 20
    )


def blob_answer() -> bytes:
    responder = BlobResponder()
    responder.receive_data(BlobInitiator().request(blob_request()))
    return responder.answer(BlobFound(size=3, length=3)) + b"".join(responder.send_data(b"abc"))


def greeting_and_welcome() -> tuple[bytes, bytes]:
    """The history of one observation, the documented one, compared with an empty one."""
    observation_id = bytes.fromhex(re.findall(r"its\s+id\s+is\s+`(\w{64})`", DOCUMENT)[0])
    bucket = bucket_of(1_700_000_000)
    summary = SetTree({bucket: digest_of([observation_id])}, IdCache()).summary("")
    greeting = sync.Greeting(first_bucket=bucket, count=summary.count, digest=summary.digest)
    responder = sync.SyncConnection(Role.RESPONDER)
    sent = sync.SyncConnection(Role.INITIATOR).send(greeting)
    assert responder.receive_data(sent) == [greeting]
    answer = SetTree({}, IdCache()).answer(summary)
    return sent, responder.send(sync.Welcome(first_bucket=bucket, answer=answer))


GREETING, WELCOME = greeting_and_welcome()

EXAMPLES = {
    "job": bytes.fromhex(job_id_of(PEER, bytes(range(8)))),
    "hello": control(Hello(agent="metaswarm/0.1.0", window_bytes=8 << 20)),
    "open": control(
        Open(
            session=SESSION,
            model=MODEL,
            blocks=BlockRange(10, 20),
            methods=("arithmetic=fp32",),
            positions=160,
            upstream=(PEER,),
            feedback=PEER,
            sampling=Sampling(max_tokens=32, stop_tokens=(2,)),
        )
    ),
    "begin": control(Begin(session=SESSION, method="arithmetic=fp32", ballots=(Ballot(PEER, (-1.5,)),))),
    "credit": control(Credit(session=SESSION, consumed_bytes=8)),
    "ping": control(Ping(nonce=7)),
    "step": step(),
    "get": BlobInitiator().request(blob_request()),
    "found": blob_answer(),
    "greeting": GREETING,
    "welcome": WELCOME,
    "span": seal(
        SpanRecord(
            peer=PEER,
            model=MODEL,
            blocks=(BlockRange(0, 15),),
            sequence=1,
            issued_at_s=1_700_000_000,
            expires_at_s=1_700_003_600,
        ),
        KEY,
    ),
}


def test_documented_examples_match_the_encoded_bytes() -> None:
    documented = dict(re.findall(r"```hex (\w+)\n([0-9a-f\n]+)```", DOCUMENT))
    assert {name: bytes.fromhex(text) for name, text in documented.items()} == EXAMPLES
    assert PEER in DOCUMENT
