"""`python -m node` is `metaswarm`."""

import sys
from pathlib import Path

if __name__ == "__main__":
    # Without -P the interpreter looks for modules in the current directory first, which is anybody's unless this is a
    # checkout that is not installed.
    if not sys.flags.safe_path and Path(sys.path[0]).resolve() != Path(__file__).resolve().parents[1]:
        del sys.path[0]

    from node.cli import main

    main()
