"""Real text that comes with the program: what trials ask about, and what lossy arithmetic is judged by.

It was written for this purpose and is under the program's own licence: stories, explanations, letters, code, tables, a
little of other languages; about 2,900 tokens of a usual tokenizer.
"""

from functools import cache
from pathlib import Path

_FILE = Path(__file__).with_name("sample.txt")


@cache
def sample_text() -> str:
    """Return the text."""
    return _FILE.read_text(encoding="utf-8")
