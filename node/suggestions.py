"""The known name that a user most likely meant by one that is unknown."""

from collections.abc import Iterable
from difflib import get_close_matches
from typing import Final

_LONGEST: Final = 64
"""Characters of a name that are compared and shown: nobody misspells a longer one, and comparing takes time."""


def unknown_name(kind: str, name: str, known: Iterable[str]) -> str:
    """Return `unknown KIND 'NAME'`, and the known name that is meant where one is close enough."""
    close = get_close_matches(name[:_LONGEST], tuple(known), n=1, cutoff=0.7)
    suggestion = f"; did you mean {close[0]!r}?" if close else ""
    return f"unknown {kind} {name[:_LONGEST]!r}{suggestion}"
