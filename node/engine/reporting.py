"""Reports of an import's child processes to the node: a JSON object a line on stdout; see `node.models.sources`."""

import json
import sys


def report(**line: object) -> None:
    """Write a line."""
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()
