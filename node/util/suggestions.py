"""The known name that a user most likely meant by one that is unknown."""

from collections.abc import Iterable
from difflib import get_close_matches
from typing import Final

LONGEST_NAME: Final = 64
"""Characters of an unknown name that are compared and shown: nobody misspells a longer one, and it takes time."""

SHORTEST_PREFIX: Final = 3
"""Characters from which on the beginning of a name stands for it."""


def suggestion(name: str, known: Iterable[str]) -> str | None:
    """Return the known name that is close enough, else the first that begins so."""
    names = {each.lower(): each for each in known}
    meant = name[:LONGEST_NAME].lower()
    if close := get_close_matches(meant, names, n=1, cutoff=0.7):
        return names[close[0]]
    begun = (each for lower, each in names.items() if lower.startswith(meant))
    return next(begun, None) if len(meant) >= SHORTEST_PREFIX else None


def did_you_mean(name: str, known: Iterable[str], prefix: str = "") -> str:
    """Return `; did you mean 'NAME'?` where a known name is close enough, else nothing.

    `prefix`: what stands before every name when it is shown.
    """
    found = suggestion(name, known)
    return f"; did you mean {prefix + found!r}?" if found else ""
