"""Paths as users write them."""

from pathlib import Path


def expand(text: str | Path) -> Path:
    """Return a path with `~` and `~user` expanded; of a user who is unknown it stays as it is written."""
    try:
        return Path(text).expanduser()
    except RuntimeError:
        return Path(text)
