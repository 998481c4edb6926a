"""Converts a GGUF file to a Hugging Face folder: `python -m node.engine.convert gguf SOURCE.gguf OUT_DIR`.

`python -m node.engine.convert check CHECKPOINT.json` only compares a checkpoint's tensors with what its architecture
needs: the file is `{"config": {...}, "tensors": {name: [dtype, shape]}}`, with the dtypes of safetensors.

A process of its own, because it holds the whole model in memory for half a minute, and because only this package may
import torch. It reports progress as `{"stage": ..., "done": n, "total": n}`, a failure as `{"error": message}`, last,
with the exit code 1.

The same file gives the same bytes on every machine: weights are dequantised to float32, and whatever depends on
versions, paths or times is left out of the JSON files. So the model id of a file is the same everywhere.

transformers fills in what a file lacks and ignores what it does not know. Here every tensor and every key of the
metadata has its place in the resulting model, or nothing is written.
"""

import argparse
import json
import os
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from math import prod
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from node.engine import gguf_tokenizer
from node.engine.interface import EngineError
from node.models.gguf_file import GgufError, GgufModel, read_gguf
from node.models.gguf_metadata import Requirement, head_size, requirements, ropes
from node.models.gguf_rope import ROPE_TENSORS, Rope
from node.models.layout import TESTED, describe_tensors
from node.util.child_process import report
from node.util.text import one_line

Item = TypeVar("Item")

# Added by transformers, or different between two machines that read the same file.
_ENVIRONMENT_KEYS = frozenset({
    "_from_model_config", "_name_or_path", "_model_name_or_path", "is_local", "local_files_only", "name_or_path",
    "tokenizer_file", "transformers_version",
})  # fmt: skip


class ConversionError(Exception):
    """The source cannot be converted. The message is one line, fit for a user."""


def _counted(items: Iterable[Item], **_options: object) -> Iterator[Item]:
    """Stand in for tqdm: report each item that has been dequantised."""
    total = len(items) if isinstance(items, Sized) else 0
    report(stage="dequantise", done=0, total=total)
    for done, item in enumerate(items, start=1):
        yield item
        report(stage="dequantise", done=done, total=total)


def convert_gguf(source: Path, out_dir: Path) -> None:
    """Write the model in `source` (any part of a GGUF model) into `out_dir`: float32 tensors, config, tokenizer files.

    Raises ConversionError when the file cannot be read, or holds or lacks something by which the model's answers
    would differ from the file's.
    """
    try:
        file = read_gguf(source)
        needs, embeddings = requirements(file), ropes(file)
        report(stage="tokenizer", done=0, total=1)
        # A name that is not found in the folder must be an error, not a look-up in the hub.
        os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error"}
        tokenizer = _read_tokenizer(file)
    except GgufError as error:
        raise ConversionError(str(error)) from None
    except OSError as error:
        raise ConversionError(f"{source}: {error.strerror}") from error
    report(stage="tokenizer", done=1, total=1)
    _join_parts(file)
    model = _load(file, needs, embeddings)
    out_dir.mkdir(parents=True, exist_ok=True)
    report(stage="write", done=0, total=1)
    if tokenizer is not None:
        tokenizer.save_pretrained(out_dir)
    model.save_pretrained(out_dir)
    for file_name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        if (path := out_dir / file_name).exists():
            content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            kept = {key: value for key, value in content.items() if key not in _ENVIRONMENT_KEYS}
            path.write_text(json.dumps(kept, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
    report(stage="write", done=1, total=1)


def _read_tokenizer(file: GgufModel) -> Any:
    """Return transformers' tokenizer of a GGUF file, with corrections; None for a file without. Raises GgufError."""
    if not gguf_tokenizer.has_tokenizer(file):
        return None
    from transformers import AutoTokenizer
    from transformers.integrations.gguf.gguf_tokenizer_mapping import set_split_regex

    try:
        tokenizer = AutoTokenizer.from_pretrained(file.paths[0].parent, gguf_file=file.name)
        if gguf_tokenizer.splits_as_qwen2(file):
            set_split_regex(tokenizer, {"pre_tokenizer_type": "qwen2"})
        gguf_tokenizer.correct(file, tokenizer.backend_tokenizer)
    except GgufError:
        raise
    except Exception as error:  # a damaged vocabulary makes gguf, tokenizers and transformers raise nearly anything
        raise gguf_tokenizer.unreadable(file, error) from error
    return tokenizer


def _check_architecture(config: dict[str, Any]) -> None:
    """Raise ConversionError if the architecture cannot be served: better now than once everything is dequantised."""
    if config.get("model_type") in TESTED:
        return
    from node.engine.architecture import check_architecture

    try:
        check_architecture(config)
    except EngineError as error:
        raise ConversionError(str(error)) from error


def _join_parts(file: GgufModel) -> None:
    """Have transformers, which opens one file by its path, read all parts of a split, and report its progress."""
    import gguf
    from transformers import modeling_gguf_pytorch_utils

    reader = gguf.GGUFReader

    class JoinedReader:
        def __init__(self, _path: object) -> None:
            parts = [reader(path) for path in file.paths]
            self.fields = parts[0].fields
            self.tensors = [tensor for part in parts for tensor in part.tensors]

    vars(gguf)["GGUFReader"] = JoinedReader
    # transformers offers no other way to learn how far the dequantisation is.
    vars(modeling_gguf_pytorch_utils)["tqdm"] = _counted


def _load(file: GgufModel, needs: Sequence[Requirement], embeddings: Mapping[str | None, Rope]) -> Any:
    """Return transformers' model of the file: every tensor of it is in the file, and every one of the file in it."""
    import torch
    from accelerate.big_modeling import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    folder, name = file.paths[0].parent, file.name
    try:
        config = AutoConfig.from_pretrained(folder, gguf_file=name)
        if file.architecture == "llama" and config.model_type != "llama":
            # A file by the name of "mistral", which transformers would give a sliding window, and then not load.
            named = {"model_type", "sliding_window"}
            config = AutoConfig.for_model("llama", **{k: v for k, v in config.to_dict().items() if k not in named})
        config = _with_requirements(config, file, needs, embeddings)
        with init_empty_weights(include_buffers=False):
            empty = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        _check_rope(empty, file, embeddings)
        _check_tensors(empty, file)
        _check_architecture(config.to_dict())
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=name, config=config, dtype=torch.float32, output_loading_info=True
        )
    except ConversionError:
        raise
    except Exception as error:  # a damaged or unknown file makes gguf and transformers raise nearly anything
        raise ConversionError(f"{name} cannot be read: {one_line(error)}") from error
    model, loading_info = loaded
    faults = [str(fault) for faults in loading_info.values() for fault in faults]
    if faults:
        raise ConversionError(f"{name} does not fit its architecture: {one_line(', '.join(sorted(faults)))}")
    # The weights are plain numbers now; with these two left, save_pretrained refuses.
    del model.hf_quantizer
    del model.config.quantization_config
    return model


def _with_requirements(
    config: Any, file: GgufModel, needs: Sequence[Requirement], embeddings: Mapping[str | None, Rope]
) -> Any:
    """Return a config that meets all requirements of the file; raise ConversionError where that is impossible."""
    # For two architectures transformers takes the head to be tied whatever the file has.
    tied = Requirement("tie_word_embeddings", "output.weight" not in file.tensors, "output.weight")
    needs = (*needs, tied)
    changes: dict[str, Any] = {
        config.attribute_map.get(need.attribute, need.attribute): need.value
        for need in needs
        if not _meets(config, need)
    }
    if rope := _rope_parameters(config, file, embeddings):
        changes["rope_parameters"] = rope
    if not changes:
        return config
    config = type(config)(**{**config.to_dict(), **changes})
    for need in needs:
        if not _meets(config, need):
            raise ConversionError(
                f"{file.name} requires {need.attribute} = {need.value} by {need.key}, which "
                f"{config.model_type} models in transformers do not support: import the safetensors checkpoint"
            )
    return config


def _meets(config: Any, need: Requirement) -> bool:
    has = getattr(config, need.attribute, None)
    if has is None and need.attribute == "head_dim":
        has = config.hidden_size // config.num_attention_heads
    if has is None and need.attribute in {"n_inner", "ffn_hidden_size"}:
        has = 4 * config.hidden_size
    if isinstance(has, float) or isinstance(need.value, float):
        if not isinstance(has, int | float) or not isinstance(need.value, int | float):
            return False
        return bool(np.float32(has) == np.float32(need.value))
    return bool(has == need.value) and (isinstance(has, bool) == isinstance(need.value, bool))


def _rope_parameters(config: Any, file: GgufModel, embeddings: Mapping[str | None, Rope]) -> dict[str, Any]:
    has = config.rope_parameters if embeddings else {}
    wanted: dict[str, Any] = {}
    for kind, rope in embeddings.items():
        said = has.get(kind, {}) if kind is not None else has
        share = 2 * len(rope.frequencies) / head_size(file)
        parameters = dict(rope.parameters)
        if said.get("partial_rotary_factor", 1.0) != share:
            parameters["partial_rotary_factor"] = share
        elif "partial_rotary_factor" in said:
            parameters["partial_rotary_factor"] = said["partial_rotary_factor"]
        if kind is None:
            wanted = parameters
        else:
            wanted[kind] = parameters
    return {} if wanted == has else wanted


def _check_rope(model: Any, file: GgufModel, embeddings: Mapping[str | None, Rope]) -> None:
    """Compare the frequencies that the model calculated from its config with those of the file."""
    found = False
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if not name.endswith("inv_freq") or "original" in name:
                continue
            kind = name.removesuffix("inv_freq").removesuffix("_") or None
            factor = getattr(module, "attention_scaling" if kind is None else f"{kind}_attention_scaling", 1.0)
            found = True
            if kind not in embeddings or embeddings[kind].differs(buffer.tolist(), factor):
                raise ConversionError(
                    f"{file.name}: transformers' {model.config.model_type} cannot apply the RoPE scaling "
                    f"of its {file.architecture}.rope.* keys: import the safetensors checkpoint"
                )
    if embeddings and not found:
        raise ConversionError(f"transformers' {model.config.model_type} has no rotary embedding to compare")


def _check_tensors(model: Any, file: GgufModel) -> None:
    """Match the file's tensors with those that the model needs; raise ConversionError for any without a counterpart."""
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

    make_processor: Any = TENSOR_PROCESSORS.get(file.architecture, TensorProcessor)
    processor = make_processor(config=model.config.to_dict())
    sources: defaultdict[str, list[str]] = defaultdict(list)
    for source, target in get_gguf_hf_weights_map(model, processor).items():
        sources[target].append(source if source.endswith((".weight", ".bias")) else f"{source}.weight")
    name, weights = file.name, model.state_dict()
    missing: list[str] = []
    for target, weight in weights.items():
        if target in model.all_tied_weights_keys:
            continue
        # Experts' matrices are put together of several tensors; else several names mean the same tensor.
        here = [source for source in sources[target] if source in file.tensors]
        whole = len(here) == len(sources[target]) if "_exps." in str(sources[target]) else bool(here)
        if not whole:
            missing += [source for source in sources[target] if source not in here] or [target]
        elif sum(prod(file.tensors[source].shape) for source in here) != weight.numel():
            shapes = ", ".join(f"{source} has shape {list(file.tensors[source].shape)}" for source in here)
            raise ConversionError(f"{name}: {shapes}, which does not make {list(weight.shape)} of {target}")
    if missing:
        raise ConversionError(f"{name} lacks {describe_tensors(missing)}: it is not the whole model")
    taken = {source for found in sources.values() for source in found} | ROPE_TENSORS
    if unused := [tensor for tensor in file.tensors if tensor not in taken]:
        raise ConversionError(
            f"{name} has {describe_tensors(unused)}, which transformers' {model.config.model_type} does not use: "
            "import the model's safetensors checkpoint"
        )


def check_checkpoint(description: Path) -> None:
    """Raise ConversionError unless a checkpoint's tensors are those of its config's architecture."""
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
        raise ConversionError(f"it has tensors of type {error}, which are not supported") from None
    except EngineError as error:
        raise ConversionError(str(error)) from None


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m node.engine.convert", description=__doc__)
    actions = parser.add_subparsers(dest="action", required=True)
    convert = actions.add_parser("gguf")
    convert.add_argument("source", type=Path)
    convert.add_argument("out_dir", type=Path)
    actions.add_parser("check").add_argument("source", type=Path)
    options = parser.parse_args(arguments)
    try:
        if options.action == "check":
            check_checkpoint(options.source)
        else:
            convert_gguf(options.source, options.out_dir)
    except (ConversionError, OSError) as error:
        report(error=one_line(error))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
