"""The documents name files, links and commands that exist, and keep to their form."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = (".", "docs", "node/network", "benchmarks", "metaswarm_client", "examples")
DOCUMENTS = [path for folder in FOLDERS for path in sorted((ROOT / folder).glob("*.md"))]
IDS = [str(path.relative_to(ROOT)) for path in DOCUMENTS]

PATH = re.compile(r"`((?:node|protocol|selector|metaswarm_client|examples|tests|benchmarks|docs)/[\w/.-]+)`")
LINK = re.compile(r"\]\((?!https?:)([^)#]*)(?:#([\w-]+))?\)")
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
GONE = {"node/jobs"}
"""Only the changelog may still name them."""


def anchors(path: Path) -> set[str]:
    headings = HEADING.findall(path.read_text(encoding="utf-8"))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=IDS)
def test_documents_name_existing_files_and_headings(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    named = {path for path in PATH.findall(text) if not (ROOT / path).exists()}
    assert named <= (GONE if document.name == "CHANGELOG.md" else set())
    for file, anchor in LINK.findall(text):
        target = document.parent / file if file else document
        assert target.exists(), file
        assert not anchor or anchor in anchors(target), f"{file}#{anchor}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=IDS)
def test_prose_wraps_at_120_characters(document: Path) -> None:
    prose = re.sub(r"^```.*?^```", "", document.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    assert [line for line in prose.splitlines() if len(line) > 120 and not line.startswith("|")] == []


def test_readme_is_a_front_door() -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) < 120
    assert {"make demo", "make test"} <= {line.partition("#")[0].strip() for line in lines}
