"""Turns a GGUF file into a Hugging Face folder: `python -m node.engine.convert gguf SOURCE.gguf OUT_DIR`.

A process of its own, because it holds the whole model in memory for half a minute, and because only this package may
import torch. On stdout it tells its progress in JSON lines `{"stage": ..., "done": n, "total": n}`; when it fails, the
last line is `{"error": message}` and the exit code 1.

The same file gives the same bytes on every machine: weights are dequantised to float32, and whatever depends on
versions, paths or times is left out of the JSON files. So everybody who imports a file gets the same model id.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sized
from pathlib import Path
from typing import Any, TypeVar

from node.engine.interface import EngineError
from node.models.layout import TESTED

Item = TypeVar("Item")

# What transformers adds by itself and what differs between two machines that read the same file.
_ENVIRONMENT_KEYS = frozenset({
    "_from_model_config",
    "_name_or_path",
    "_model_name_or_path",
    "is_local",
    "local_files_only",
    "name_or_path",
    "tokenizer_file",
    "transformers_version",
})  # fmt: skip


class ConversionError(Exception):
    """The source cannot be converted. The message is one line, fit for a user."""


def _say(line: dict[str, object]) -> None:
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


def _report(stage: str, done: int, total: int) -> None:
    _say({"stage": stage, "done": done, "total": total})


def _counted(items: Iterable[Item], **_options: object) -> Iterator[Item]:
    """Stand in for tqdm: report each item that has been dequantised."""
    total = len(items) if isinstance(items, Sized) else 0
    _report("dequantise", 0, total)
    for done, item in enumerate(items, start=1):
        yield item
        _report("dequantise", done, total)


def _rewrite_json(path: Path) -> None:
    """Drop what depends on the environment, and sort the keys."""
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    kept = {key: value for key, value in content.items() if key not in _ENVIRONMENT_KEYS}
    path.write_text(json.dumps(kept, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def convert_gguf(source: Path, out_dir: Path) -> None:
    """Write the model in `source` (a GGUF file) into `out_dir`: safetensors in float32, config and tokenizer files.

    Raises ConversionError when the file is no GGUF file or its architecture is unknown to transformers.
    """
    try:
        with source.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise ConversionError(f"{source}: {error.strerror}") from error
    if magic != b"GGUF":
        raise ConversionError(f"{source} is no GGUF file: it starts with {magic!r}")
    _report("tokenizer", 0, 1)
    # A name that is not found in the folder must be an error, not a look-up in the hub.
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error"}
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, modeling_gguf_pytorch_utils

    # transformers offers no other way to learn how far the dequantisation is.
    vars(modeling_gguf_pytorch_utils)["tqdm"] = _counted
    folder, name = source.parent, source.name
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
        _report("tokenizer", 1, 1)
        _try_out(AutoConfig.from_pretrained(folder, gguf_file=name).to_dict())
        model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
    except ConversionError:
        raise
    except Exception as error:  # a damaged or unknown file makes gguf and transformers raise nearly anything
        raise ConversionError(f"{source} cannot be read: {_one_line(error)}") from error
    # The weights are plain numbers now; with these two left, save_pretrained refuses.
    del model.hf_quantizer
    del model.config.quantization_config
    out_dir.mkdir(parents=True, exist_ok=True)
    _report("write", 0, 1)
    tokenizer.save_pretrained(out_dir)
    model.save_pretrained(out_dir)
    for file_name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        if (path := out_dir / file_name).exists():
            _rewrite_json(path)
    _report("write", 1, 1)


def _try_out(config: dict[str, Any]) -> None:
    """Raise ConversionError if the architecture cannot be served: better now than once everything is dequantised."""
    if config.get("model_type") in TESTED:
        return
    from node.engine.architecture import try_out

    try:
        try_out(config)
    except EngineError as error:
        raise ConversionError(str(error)) from error


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:500] or type(error).__name__


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m node.engine.convert", description=__doc__)
    parser.add_argument("format", choices=["gguf"])
    parser.add_argument("source", type=Path)
    parser.add_argument("out_dir", type=Path)
    options = parser.parse_args(arguments)
    try:
        convert_gguf(options.source, options.out_dir)
    except (ConversionError, OSError) as error:
        _say({"error": _one_line(error)})
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
