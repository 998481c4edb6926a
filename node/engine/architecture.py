"""Tests whether an architecture can be served in spans: `python -m node.engine.architecture CONFIG.json`.

A tiny random model of the same architecture is imported and loaded as a real one would be, and must give the logits of
transformers' `generate` in one piece and however it is cut, with chunked prefill, for sessions of different lengths
side by side. Unsupported architectures are refused here, before anything large is copied.

A process of its own, because only this package may import torch. The last line on stdout is `{"parts": ...}`, which
modules stand around the blocks (see `node.models.layout.OuterNames`), or `{"error": message}` with the exit code 1.
"""

import argparse
import itertools
import json
import os
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers.modeling_utils import PreTrainedModel

from node.engine.backends.interface import Rows
from node.engine.backends.transformers import TransformersSpan
from node.engine.interface import PAGE_POSITIONS, EngineError, source_from_package
from node.engine.kv_cache import KvCache, SlotMapping
from node.engine.loading import config_from, describe, load_span, name_of
from node.engine.shrink import shrink
from node.models.errors import ModelError
from node.models.files import ignore_progress
from node.models.importer import build_package, read_checkpoint
from node.models.layout import OuterNames
from node.models.store import Package
from node.util.child_process import report
from node.util.text import one_line
from protocol.identity import BlockRange

PROMPTS = ([3, 14, 15, 92, 65, 35, 89, 79, 32, 38, 46], [27, 18, 28], [61, 80, 33, 98, 87, 49, 9])
"""Of different lengths, and longer than the windows of a shrunk config."""
COUNT = 6
"""Tokens to generate after each."""
CHUNK = 4
_PAGES = -(-(max(map(len, PROMPTS)) + COUNT) // PAGE_POSITIONS)

_CUTS = 4
_MAX_PARAMETERS = 1 << 26
_TOLERANCE = 1e-2
"""Of logits, over their spread: chunks round differently, and a fault is a hundred times as large."""


@dataclass(frozen=True, slots=True)
class Reference:
    """Greedy tokens of `generate` after a prompt, and their logits."""

    prompt: Sequence[int]
    tokens: Sequence[int]
    logits: torch.Tensor


def check_architecture(content: Mapping[str, Any]) -> OuterNames:
    """Return the modules around the blocks of the model that the content of a config.json describes.

    Raises EngineError with the reason if it cannot be served in spans.
    """
    described = describe(content)
    name, names = name_of(described.config), described.names
    try:
        with tempfile.TemporaryDirectory() as folder:
            model = tiny_model(shrink(described.config))
            references = references_of(model)
            package = package_of(model, Path(folder), names)
            _compare(package, references)
    except _DiffersError as error:
        raise EngineError(f"{name} cannot be split into spans here: {error}") from error
    except (EngineError, ModelError) as error:
        raise EngineError(f"{name} cannot be served: {error}") from error
    except Exception as error:  # an untested architecture may raise anything
        raise EngineError(f"{name} could not be tested: {one_line(error)}") from error
    return names


def tiny_model(content: Mapping[str, Any]) -> PreTrainedModel:
    """Return a model with random weights that give many different tokens."""
    model: PreTrainedModel = describe(content).model
    if sum(parameter.numel() for parameter in model.parameters()) > _MAX_PARAMETERS:
        raise EngineError("it has modules too large for a trial")
    config = config_from(content)
    torch.manual_seed(0)
    model = type(model)(config)
    randomise(model, 0)
    model.eval()
    return model


def randomise(model: PreTrainedModel, seed: int) -> None:
    """Fill a model with large weights: those of its own initialisation make it repeat two or three tokens."""
    torch.manual_seed(seed)
    kept = model.state_dict(keep_vars=True)
    with torch.no_grad():
        for name, tensor in kept.items():
            if not tensor.is_floating_point():
                continue
            if tensor.dim() > 1 and isinstance(tensor, torch.nn.Parameter):
                tensor.normal_(0, 2 / tensor.shape[-1] ** 0.5)
            else:
                tensor.normal_(1.0 if name.endswith("weight") else 0.0, 0.1)


def references_of(model: PreTrainedModel, prompts: Iterable[Sequence[int]] = PROMPTS) -> list[Reference]:
    """Return the output of `generate` for each prompt alone."""
    generation: Any = model.generation_config
    generation.eos_token_id, generation.pad_token_id = None, 0
    made = []
    for ids in prompts:
        prompt = [token % model.config.vocab_size for token in ids]  # a vocabulary may be smaller than these prompts'
        output: Any = model.generate(  # type: ignore[operator]
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=COUNT,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        logits = torch.cat(output.logits)
        if not torch.isfinite(logits).all():
            raise EngineError("a random model of it gives no finite logits")
        made.append(Reference(prompt, output.sequences[0, len(prompt) :].tolist(), logits))
    return made


def package_of(model: PreTrainedModel, folder: Path, names: OuterNames) -> Package:
    """Save a model as a checkpoint, and import that."""
    model.save_pretrained(folder / "checkpoint")
    checkpoint = read_checkpoint(folder / "checkpoint", names)
    manifest = build_package(folder / "checkpoint", checkpoint, folder / "package", ignore_progress)
    return Package(manifest, folder / "package")


class _DiffersError(Exception):
    """The tiny model gives other logits when it is cut."""


@dataclass(frozen=True, slots=True)
class _Stage:
    """Blocks of a loaded span, which may be a part of it, and the span's KV cache."""

    model: TransformersSpan
    kv: KvCache
    blocks: range


def _compare(package: Package, references: Sequence[Reference]) -> None:
    """Run a package in one piece, through parts of that, and in two and three spans."""
    count = package.manifest.block_count
    whole = _load(package, BlockRange(0, count), "in one piece")
    _check([whole], references, "in one piece")
    for cut in range(1, count, max(1, count // _CUTS)):
        parts = [replace(whole, blocks=blocks) for blocks in (range(cut), range(cut, count))]
        _check(parts, references[:1], f"cut after block {cut} of {count}")
    for cuts in ((count // 2,), (count // 3, count - count // 3)):
        edges = sorted({0, *cuts, count})
        how = f"in {len(edges) - 1} spans"
        spans = [_load(package, BlockRange(start, end), how) for start, end in itertools.pairwise(edges)]
        _check(spans, references, how)


def _load(package: Package, blocks: BlockRange, how: str) -> _Stage:
    pages = len(PROMPTS) * _PAGES
    span = load_span(source_from_package(package, blocks), blocks, torch.float32)
    try:
        model = TransformersSpan(span)
        kv = KvCache([block.resized(pages * PAGE_POSITIONS) for block in model.trial_run()])
    except Exception as error:  # an untested architecture may raise anything
        raise _DiffersError(f"{how} its forward pass fails") from error
    return _Stage(model, kv, range(len(blocks)))


def _check(stages: Sequence[_Stage], references: Sequence[Reference], how: str) -> None:
    steps = [[*range(0, len(r.prompt), CHUNK), *range(len(r.prompt), len(r.prompt) + COUNT - 1)] for r in references]
    for turn, session in itertools.product(range(max(map(len, steps))), range(len(references))):
        if turn < len(steps[session]):
            slots = SlotMapping(range(session * _PAGES, (session + 1) * _PAGES))
            _check_step(stages, references[session], slots, steps[session][turn], how)


def _check_step(stages: Sequence[_Stage], reference: Reference, slots: SlotMapping, position: int, how: str) -> None:
    prompt, text = len(reference.prompt), [*reference.prompt, *reference.tokens]
    end = min(position + CHUNK, prompt) if position < prompt else position + 1
    rows, draws = torch.tensor(text[position:end]), int(end >= prompt)
    try:
        for stage in stages:
            (rows,) = stage.model.run([Rows(rows, slots, position, draws)], stage.kv, stage.blocks)
    except Exception as error:  # an untested architecture may raise anything
        raise _DiffersError(f"{how} its forward pass fails") from error
    if draws:
        expected = reference.logits[end - prompt]
        difference = float((rows[0] - expected).abs().max() / expected.std())
        if not difference <= _TOLERANCE:
            raise _DiffersError(f"{how} it gives other logits than `generate`, {end - prompt} tokens after a prompt")


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m node.engine.architecture", description=__doc__)
    parser.add_argument("config", type=Path)
    options = parser.parse_args(arguments)
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    torch.set_num_threads(1)  # more would only wait for each other
    try:
        names = check_architecture(json.loads(options.config.read_text(encoding="utf-8")))
    except (EngineError, OSError, ValueError) as error:
        report(error=one_line(error))
        return 1
    parts = {"embed": sorted(names.embed), "head": sorted(names.head), "output": names.output, "input": names.input}
    report(parts=parts)
    return 0


if __name__ == "__main__":
    sys.exit(main())
