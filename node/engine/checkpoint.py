"""Compares a checkpoint's tensors with what its architecture needs: `python -m node.engine.checkpoint CHECKPOINT.json`.

The file is `{"config": {...}, "tensors": {name: [dtype, shape]}}`, with the dtypes of safetensors. A process of its
own, because it needs torch, and because a config is untrusted. A failure is reported as `{"error": message}`,
with the exit code 1.
"""

import argparse
import json
import os
import sys
from pathlib import Path

from node.engine.interface import EngineError
from node.util.child_process import report
from node.util.text import one_line


def check_checkpoint(description: Path) -> None:
    """Raise EngineError unless a checkpoint's tensors are those of its config's architecture."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    import torch
    from safetensors.torch import _TYPES

    from node.engine.loading import check_weights

    content = json.loads(description.read_bytes())
    try:
        types: dict[str, torch.dtype] = {name: dtype for name, dtype in _TYPES.items() if dtype is not None}
        tensors = {name: (types[dtype], tuple(shape)) for name, (dtype, shape) in content["tensors"].items()}
        check_weights(content["config"], tensors)
    except KeyError as error:
        raise EngineError(f"it has tensors of type {error}, which are not supported") from None


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m node.engine.checkpoint", description=__doc__)
    parser.add_argument("description", type=Path)
    options = parser.parse_args(arguments)
    try:
        check_checkpoint(options.description)
    except (EngineError, OSError) as error:
        report(error=one_line(error))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
