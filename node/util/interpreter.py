"""The command and environment of a child process that runs this interpreter and this package.

Whatever lies in the current directory: `-P`, and PYTHONSAFEPATH for its own children, keep a `torch.py` or a folder
`node/` there from being imported. Without trio, as engine workers have no event loop.
"""

import os
import sys
import sysconfig
from collections.abc import Mapping
from pathlib import Path
from typing import Final

_ROOT: Final = Path(__file__).resolve().parents[2]
# They make an interpreter stay after its work, run files that nobody asked for, or write pages to stderr.
_UNWANTED: Final = ("PYTHONINSPECT", "PYTHONPROFILEIMPORTTIME", "PYTHONSTARTUP", "PYTHONVERBOSE")


def python(*arguments: str) -> tuple[str, ...]:
    """Return the command that runs this interpreter, which imports nothing from the current directory."""
    return (sys.executable, "-P", *arguments)


def child_environment(
    changes: Mapping[str, str] | None = None, *, base: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Return the environment of a child, in which this package is found: `base`, by default ours, with `changes`.

    Entries of PYTHONPATH that depend on the current directory are left out.
    """
    inherited = os.environ if base is None else base
    paths = [path for path in inherited.get("PYTHONPATH", "").split(os.pathsep) if Path(path).is_absolute()]
    if str(_ROOT) not in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *paths}:
        paths.insert(0, str(_ROOT))  # a checkout; where the package is installed, the interpreter finds it by itself
    environment = {name: value for name, value in inherited.items() if name not in {"PYTHONPATH", *_UNWANTED}}
    environment["PYTHONSAFEPATH"] = "1"
    if paths:
        environment["PYTHONPATH"] = os.pathsep.join(paths)
    return environment | dict(changes or {})
