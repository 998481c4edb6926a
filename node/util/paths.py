"""Paths as users write them, and the files there."""

from pathlib import Path


def expand(text: str | Path) -> Path:
    """Return a path with `~` and `~user` expanded; of a user who is unknown it stays as it is written."""
    try:
        return Path(text).expanduser()
    except RuntimeError:
        return Path(text)


def read_text(path: Path) -> str:
    """Return the text of a file that an option names. Raises ValueError."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not a text file") from None
