"""Errors of libraries, and sizes, as text."""


def one_line(error: object, limit: int = 300) -> str:
    """Return what an error says in one line of at most `limit` characters, or its type where it says nothing."""
    return " ".join(str(error).split())[:limit] or type(error).__name__


def format_size(count: int) -> str:
    """Return a file's size in decimal units, as model hubs state it."""
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"
