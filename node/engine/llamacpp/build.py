"""Opens llama.cpp as an engine would, and prints its version and backends: `python -m node.engine.llamacpp.build`.

A process of its own, as a damaged library may end it.
"""

import sys

from node.engine.interface import EngineError
from node.engine.llamacpp.library import load_library


def main() -> int:
    """Print the line, or on stderr why the library is unusable; return the exit code."""
    try:
        sys.stdout.write(f"{load_library().build()}\n")
    except EngineError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
