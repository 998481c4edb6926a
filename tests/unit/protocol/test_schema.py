"""What a declaration of fields means on the wire."""

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

import pytest

from protocol.errors import RemoteProtocolError
from protocol.identity import BlockRange, PeerId, peer_id_from_public_key
from protocol.schema import (
    ARRAY,
    LOCAL,
    OMIT_DEFAULT,
    Count,
    Key,
    MessageTypes,
    Nullable,
    Range,
    from_map,
    name,
    to_map,
)

PEER = peer_id_from_public_key(bytes(32))

Small = Annotated[int, Range(0, 9)]
Title = Annotated[str, name(8)]


class Colour(enum.StrEnum):
    RED = "red"


class Pair(NamedTuple):
    left: Small
    right: Title


@dataclass(frozen=True, slots=True)
class Inner:
    count: Small
    share: Annotated[float, Range(0.0, 1.0)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Everything:
    signer: Annotated[PeerId, LOCAL]
    number: Small
    renamed: Annotated[Small, Key("other")] = 1
    colour: Colour = Colour.RED
    blocks: BlockRange
    optional: Small | None = None
    nullable: Nullable[Small] = None
    neutral: Annotated[int, Range(1, 9), OMIT_DEFAULT] = 0
    inner: Inner = Inner(0, 0.0)
    listed: Annotated[Inner, ARRAY] = Inner(0, 0.0)
    pairs: Annotated[tuple[Pair, ...], Count(2, 1)] = (Pair(1, "a"),)
    fixed: tuple[Small, Title] = (1, "a")
    named: Annotated[Mapping[Title, Small], Count(2)]

    def check(self) -> None:
        if self.number == 9:
            raise RemoteProtocolError("nine is not allowed")


VALUE = Everything(signer=PEER, number=3, blocks=BlockRange(0, 2), named={"a": 1}, inner=Inner(1, 1))
MAP: dict[str, Any] = {
    "number": 3,
    "other": 1,
    "colour": "red",
    "blocks": [0, 2],
    "nullable": None,
    "inner": {"count": 1, "share": 1.0},
    "listed": [0, 0.0],
    "pairs": [[1, "a"]],
    "fixed": [1, "a"],
    "named": {"a": 1},
}


def test_map_follows_from_the_declaration() -> None:
    assert to_map(VALUE) == MAP
    assert isinstance(to_map(VALUE)["inner"]["share"], float), "an integer in a float field is encoded as a float"
    assert from_map(Everything, MAP, "value", signer=PEER) == VALUE
    full = MAP | {"optional": 4, "nullable": 5, "neutral": 6}
    assert to_map(from_map(Everything, full, "value", signer=PEER)) == full


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"more": 1}, "value has an unknown field 'more'"),
        ({"signer": PEER}, "value has an unknown field 'signer'"),
        ({"number": None}, "value number is not an integer"),
        ({"number": True}, "value number is not an integer"),
        ({"number": 10}, "value number is 10: expected 0 to 9"),
        ({"number": 9}, "nine is not allowed"),
        ({"other": -1}, "value other is -1"),
        ({"colour": "blue"}, "value colour is not one of red"),
        ({"blocks": [2, 2]}, "value blocks: 2-2 is not a range"),
        ({"optional": None}, "value optional is not an integer"),
        ({"nullable": 10}, "value nullable is 10"),
        ({"neutral": 0}, "value neutral is 0"),
        ({"inner": {"count": 0}}, "value inner lacks 'share'"),
        ({"inner": {"count": 0, "share": 1}}, "value inner share is not a float"),
        ({"listed": [0]}, "value listed is not an array of 2 elements"),
        ({"listed": [0, 2.0]}, "value listed share is 2.0"),
        ({"pairs": []}, "value pairs has 0 elements: expected 1 to 2"),
        ({"pairs": [[1, ""]]}, "value pairs right is empty"),
        ({"fixed": [1, "a", 2]}, "value fixed is not an array of 2 elements"),
        ({"named": {"a": 1, "b": 2, "c": 3}}, "value named has 3 entries: expected 0 to 2"),
        ({"named": {"": 1}}, "value named is empty"),
        ({"named": {"a": 10}}, "value named is 10"),
    ],
)
def test_error_names_the_invalid_field(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RemoteProtocolError, match=message):
        from_map(Everything, MAP | changes, "value", signer=PEER)


@pytest.mark.parametrize("key", MAP)
def test_rejects_missing_fields(key: str) -> None:
    with pytest.raises(RemoteProtocolError, match=f"value lacks '{key}'"):
        from_map(Everything, {other: each for other, each in MAP.items() if other != key}, "value", signer=PEER)


def test_message_types_are_told_apart_by_name() -> None:
    messages = MessageTypes({"inner": Inner})
    assert messages.to_map(Inner(1, 0.5)) == {"type": "inner", "count": 1, "share": 0.5}
    assert messages.from_map({"type": "inner", "count": 1, "share": 0.5}) == Inner(1, 0.5)
    with pytest.raises(RemoteProtocolError, match="inner count is 10"):
        messages.to_map(Inner(10, 0.5))
    unknown: list[object] = [{}, {"type": "outer"}, {"type": ["inner"]}, [], None]
    for value in unknown:
        with pytest.raises(RemoteProtocolError, match="is unknown"):
            messages.from_map(value)
