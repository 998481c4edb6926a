"""README.md names tests that exist, for every fault of the library and its cure."""

import re
from pathlib import Path

import node.network

HERE = Path(__file__).parent
README = Path(node.network.__file__).with_name("README.md")
LETTERS = {"F": "library_faults", "C": "cures", "Y": "yamux", "P": "processes"}


def test_fragments_in_readme_match_test_names() -> None:
    named = 0
    for row in re.findall(r"^\|.*\|$", README.read_text(encoding="utf-8").partition("## Cures")[2], re.MULTILINE)[2:]:
        for cell in row.strip("|").split("|")[-2:]:
            names: list[str] = []
            for letter, fragment in re.findall(r"\b([FCYP])\b|`(\w+(?:\.py)?)`", cell):
                if letter or fragment.endswith(".py"):
                    file = HERE / (fragment or f"test_{LETTERS[letter]}.py")
                    names = re.findall(r"def (test_\w+)", file.read_text(encoding="utf-8"))
                else:
                    assert any(fragment in name for name in names), f"no test of this name: {fragment}"
                    named += 1
    assert named > 60
