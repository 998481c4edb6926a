"""The known name that a user most likely meant by one that is unknown."""

from collections.abc import Iterable
from difflib import get_close_matches
from typing import Final

LONGEST_NAME: Final = 64
"""Characters of an unknown name that are compared and shown: nobody misspells a longer one, and it takes time."""


def did_you_mean(name: str, known: Iterable[str], prefix: str = "") -> str:
    """Return `; did you mean 'NAME'?` where a known name is close enough, else nothing.

    `prefix`: what stands before every name when it is shown.
    """
    close = get_close_matches(name[:LONGEST_NAME], tuple(known), n=1, cutoff=0.7)
    return f"; did you mean {prefix + close[0]!r}?" if close else ""
