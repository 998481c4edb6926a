import pytest

from protocol.identity import (
    BlockRange,
    parse_block_range,
    parse_model_id,
    parse_peer_id,
    peer_id_from_public_key,
    public_key_of,
)
from protocol.limits import MAX_BLOCKS

KEY = bytes(range(32))


def test_peer_id_contains_the_public_key() -> None:
    peer = peer_id_from_public_key(KEY)
    assert peer.startswith("12D3KooW")
    assert parse_peer_id(peer) == peer
    assert public_key_of(peer) == KEY


@pytest.mark.parametrize("length", [0, 31, 33])
def test_rejects_keys_other_than_ed25519(length: int) -> None:
    with pytest.raises(ValueError, match="32 bytes"):
        peer_id_from_public_key(bytes(length))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "x",
        "0OIl",
        "é",
        "QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N",
        "1" * 65,
        peer_id_from_public_key(KEY)[:-1],
        peer_id_from_public_key(KEY) + "1",
        "1" + peer_id_from_public_key(KEY),
        peer_id_from_public_key(KEY) + "\n",
        " " + peer_id_from_public_key(KEY),
        peer_id_from_public_key(KEY) + " ",
    ],
)
def test_rejects_peer_ids_that_are_not_canonical(text: str) -> None:
    with pytest.raises(ValueError, match="peer id"):
        parse_peer_id(text)


def test_model_id_is_lower_case_hexadecimal() -> None:
    assert parse_model_id("0a" * 32) == "0a" * 32
    for unit, end in (("", ""), ("0A", ""), ("0a", "0"), ("0a", "\n"), ("zz", "")):
        with pytest.raises(ValueError, match="model id"):
            parse_model_id(unit * 32 + end)


def test_block_range_is_non_empty_and_end_exclusive() -> None:
    blocks = parse_block_range("3-7")
    assert blocks == BlockRange(3, 7)
    assert str(blocks) == "3-7"
    assert len(blocks) == 4
    assert [block in blocks for block in (2, 3, 6, 7)] == [False, True, True, False]


@pytest.mark.parametrize(
    "text", ["", "3", "3-", "-7", "3-3", "7-3", "a-b", "3-7 ", "0-1025", "3-7\n", "\u0663-\u0667", "00001-2"]
)
def test_rejects_malformed_block_ranges(text: str) -> None:
    with pytest.raises(ValueError, match="range of blocks"):
        parse_block_range(text)


def test_bounds_the_blocks_of_a_model() -> None:
    assert BlockRange(0, MAX_BLOCKS).end == MAX_BLOCKS
    with pytest.raises(ValueError, match="range of blocks"):
        BlockRange(0, MAX_BLOCKS + 1)
    with pytest.raises(ValueError, match="range of blocks"):
        BlockRange(-1, 1)
