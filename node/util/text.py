"""Errors of libraries as text."""


def one_line(error: object, limit: int = 300) -> str:
    """Return what an error says in one line of at most `limit` characters, or its type where it says nothing."""
    return " ".join(str(error).split())[:limit] or type(error).__name__
