"""A current directory full of modules that nobody should import: each leaves a mark when it is."""

from pathlib import Path

MODULES = (
    "torch",
    "numpy",
    "json",
    "jinja2",
    "tokenizers",
    "msgpack",
    "trio",
    "sitecustomize",
    "node/__init__",
    "protocol/__init__",
)


def fill(folder: Path) -> Path:
    """Put the modules into a folder, and return the file that is there once one was imported."""
    mark = folder / "imported"
    for name in MODULES:
        file = folder / f"{name}.py"
        file.parent.mkdir(exist_ok=True)
        file.write_text(f"open({str(mark)!r}, 'a').write({name!r}); raise SystemExit('imported {name}')\n")
    return mark
