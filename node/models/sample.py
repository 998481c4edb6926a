"""Sample text for trials and for measuring the quality of lossy arithmetic.

It was written for this purpose, under the program's own licence: stories, explanations, letters, code, tables, a little
of other languages; about 2,900 tokens of a usual tokenizer.
"""

from functools import cache
from pathlib import Path

_FILE = Path(__file__).with_name("sample.txt")


@cache
def sample_text() -> str:
    """Return the text."""
    return _FILE.read_text(encoding="utf-8")
