"""Which model the beginning of an id means. Peers could make up models whose ids begin alike."""

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from protocol.identity import ModelId

ID_PREFIX: Final = re.compile(r"[0-9a-f]{8,64}")

PEER_ID_DIGITS: Final = 16
"""Of an id that only peers name: for fewer a peer could make up a model that begins alike."""


def meant_by(text: str, own: Iterable["ModelId"], of_peers: Iterable["ModelId"]) -> set["ModelId"]:
    """Return the models whose id begins with a text: those of peers where no other does, by 16 digits or more."""
    if not ID_PREFIX.fullmatch(text):
        return set()
    counted = of_peers if len(text) >= PEER_ID_DIGITS else ()
    return {each for each in own if each.startswith(text)} or {each for each in counted if each.startswith(text)}
