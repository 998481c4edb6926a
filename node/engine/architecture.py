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
import re
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel

from node.engine.backends.interface import Rows
from node.engine.backends.transformers import TransformersSpan
from node.engine.interface import PAGE_POSITIONS, EngineError, source_from_package
from node.engine.kv_cache import KvCache, SlotMapping
from node.engine.loading import config_from, describe, load_span, name_of
from node.models.checkpoint import read_checkpoint
from node.models.errors import ModelError
from node.models.files import ignore_progress
from node.models.importer import build_package
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

VOCABULARY = 101
POSITIONS = 64
ORIGINAL_POSITIONS = 32
"""Of rotary scaling that begins at some length."""

_HEAD_SIZE = 16
_BLOCKS, _MOST_BLOCKS = 5, 12
_WINDOW = 6

_LEFT_OUT = frozenset({
    "architectures", "dtype", "id2label", "label2id", "num_labels", "problem_type", "transformers_version",
    "_name_or_path", "quantization_config",
})  # fmt: skip

_HEADS = re.compile(r"(?:.*_)?(?:heads|n_head)(?:_per_layer)?|num_query_groups")
_HEAD_SIZES = re.compile(r".*head_dim|.*head_size|rotary_dim|dim_head|d_head|kv_channels|d_kv")
_EXPERTS = re.compile(r"(?:moe_)?(?:num|n)_(?:local_|routed_)?experts|num_experts|zero_expert_num")
_CHOSEN_EXPERTS = re.compile(r".*experts?_per_tok(?:en)?|moe_topk|moe_k|top_k_experts")
_POSITION_LIMITS = re.compile(
    r"max_position_embeddings|n_positions|n_ctx|max_seq_len|max_sequence_length|model_max_length|seq_length|context_length"
)
_WINDOWS = re.compile(r".*sliding_window(?:_size)?|.*window_size|local_attention|attention_chunk_size|floor_scale")
_WIDTHS = re.compile(
    r".*(?:hidden|intermediate|embedding|embed|ffn|mlp|feed_forward|inner|_ff|dff|d_model|emb|embd|rank|lowrank|width|dim)"
    r"(?:_size|_dim|_embd|_width|_mlp)?(?:_per_layer_input)?|n_embd|n_inner|d_inner|moe_intermediate_size|intermediate_size_mlp"
    r"|ffn_hidden_size|lru_width|attention_hidden_size|embedding_size|word_embed_proj_dim"
)
_FIRST_BLOCKS = re.compile(r"first_k_dense_replace|num_dense_layers|moe_layer_start_index")


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


def shrink(config: PreTrainedConfig) -> dict[str, Any]:
    """Return the content of a tiny config.json: the same architecture, patterns and ratios, with few and small blocks.

    Whatever selects code is kept: kinds of blocks and their order, groups of heads, experts, rotary scaling, windows
    (so short that a few tokens pass them). Sizes are divided.
    """
    return _Shrinking(config).content()


class _Shrinking:
    def __init__(self, config: PreTrainedConfig) -> None:
        self._config = config
        self._whole = {key: value for key, value in config.to_dict().items() if key not in _LEFT_OUT}
        self._blocks = config.num_hidden_layers
        self._chosen = self._choose_blocks()
        heads = self._named("num_attention_heads") or 1
        groups = self._named("num_key_value_heads") or self._named("num_kv_heads") or heads
        self._heads, self._groups = heads, groups
        self._new_groups = min(groups, 4 if groups == heads else 2)
        per_group = max(1, heads // groups)
        self._new_heads = self._new_groups * (min(per_group, 4) if groups == 1 else min(per_group, 2))
        self._hidden = self._named("hidden_size") or 1
        self._head_size = self._named("head_dim") or max(1, self._hidden // heads)
        self._new_head_size = next(
            (new for new in (_HEAD_SIZE, 2 * _HEAD_SIZE, 4 * _HEAD_SIZE) if self._turns_pairs(new)), self._head_size
        )
        same = self._hidden == heads * self._head_size
        self._new_hidden = self._new_heads * self._new_head_size + (0 if same else 2 * _HEAD_SIZE)

    def content(self) -> dict[str, Any]:
        content = {key: self._shrunk(str(key), value) for key, value in self._whole.items()}
        # Checked also without such blocks.
        if type(content.get("mamba_d_head")) is int and content.get("mamba_n_heads"):
            inner = content.get("mamba_expand", 1) * self._new_hidden
            content["mamba_d_head"] = max(1, inner // content["mamba_n_heads"])
        return {"model_type": self._config.model_type, **content}

    def _named(self, name: str) -> int:
        """Return a number of the config, the largest where each block has its own; 0 without one."""
        value = self._whole.get(self._config.attribute_map.get(name, name))
        value = max(value, default=0) if isinstance(value, list) else value
        return value if type(value) is int else 0

    def _turns_pairs(self, head_size: int) -> bool:
        """Whether partial rotary embeddings fit: an even number of elements, at least four."""
        factors = _all_of(self._whole, "partial_rotary_factor")
        turned = [int(head_size * float(factor)) for factor in factors if isinstance(factor, int | float)]
        return all(count % 2 == 0 and count >= 4 for count in turned)

    def _choose_blocks(self) -> Sequence[int]:
        """Return the blocks to keep: the first few if all kinds are among them, else the first two of each kind."""
        lists = [value for value in self._whole.values() if isinstance(value, list) and len(value) == self._blocks]
        special = self._whole.get("per_layer_config") or {}
        special = {int(key): str(value) for key, value in special.items() if str(key).isdigit()}
        kinds = [str([values[block] for values in lists] + [special.get(block)]) for block in range(self._blocks)]
        if any(sorted(values) == list(range(self._blocks)) for values in lists if all(type(v) is int for v in values)):
            kinds = [""] * self._blocks  # a permutation of the blocks, not their kinds
        first = {kind: kinds.index(kind) for kind in kinds}
        needed = max(first.values(), default=0) + 2
        if needed <= _MOST_BLOCKS:
            counts = range(min(self._blocks, max(_BLOCKS, needed)), min(self._blocks, _MOST_BLOCKS) + 1)
            # Some architectures insist on the kind of the last block.
            return range(next((count for count in counts if kinds[count - 1] == kinds[-1]), counts[0]))
        return sorted({block for start in first.values() for block in (start, min(start + 1, self._blocks - 1))})[
            :_MOST_BLOCKS
        ]

    def _shrunk(self, key: str, value: Any) -> Any:
        if key == "per_layer_config" and isinstance(value, dict):
            by_block = {int(block): part for block, part in value.items() if str(block).isdigit()}
            return {
                str(new).zfill(2): {name: self._number(name, size) for name, size in by_block[old].items()}
                for new, old in enumerate(self._chosen)
                if old in by_block
            }
        if key.startswith("rope_") and isinstance(value, dict):
            return self._rope(value)
        if isinstance(value, dict):
            return {name: self._shrunk(str(name), part) for name, part in value.items()}
        if isinstance(value, list):
            return self._list(key, value)
        return self._number(key, value)

    def _list(self, key: str, values: list[Any]) -> list[Any]:
        if len(values) == self._blocks and values != list(range(self._blocks)):
            return [self._number(key, values[block]) for block in self._chosen]
        if re.search(r"layer|idx|ids", key) and all(type(value) is int and value < self._blocks for value in values):
            return [new for new, old in enumerate(self._chosen) if old in values]
        return [self._number(key, value) for value in values]

    def _rope(self, rope: dict[str, Any]) -> dict[str, Any]:
        new: dict[str, Any] = {}
        for key, value in rope.items():
            if isinstance(value, dict):
                new[key] = self._rope(value)
            elif key in {"short_factor", "long_factor"}:
                count = max(1, len(value) * self._new_head_size // self._head_size)
                new[key] = [value[place * len(value) // count] for place in range(count)]
            elif key == "mrope_section":
                new[key] = [part * self._new_head_size // self._head_size for part in value]
            elif key == "original_max_position_embeddings":
                new[key] = ORIGINAL_POSITIONS
            else:
                new[key] = value
        return new

    def _number(self, key: str, value: Any) -> Any:
        if type(value) is not int or value <= 0:
            return value
        for pattern, new in self._rules():
            if pattern.fullmatch(key):
                return new(value)
        if re.search(r"layers?$|blocks$", key) and value in {self._blocks, self._blocks - 1}:
            return len(self._chosen) - (self._blocks - value)
        return value

    def _rules(self) -> list[tuple[re.Pattern[str], Callable[[int], int]]]:
        few = len(self._chosen)
        return [
            (re.compile(r".*vocab_size.*"), lambda value: min(value, VOCABULARY)),
            (re.compile(r".*token_id|.*token_index"), lambda value: value % VOCABULARY),
            (re.compile(r"original_max_position_embeddings"), lambda value: min(value, ORIGINAL_POSITIONS)),
            (_POSITION_LIMITS, lambda value: min(value, POSITIONS)),
            (re.compile(r"max_window_layers"), lambda value: few if value >= self._blocks else min(value, few // 2)),
            (re.compile(r"num_kv_shared_layers"), lambda value: max(1, few * value // self._blocks)),
            (_FIRST_BLOCKS, lambda value: min(value, 1)),
            (re.compile(r"moe_layer_end_index"), lambda value: min(value, few - 1)),
            (re.compile(r"num_hidden_layers|n_layers?|num_layers"), lambda value: few * value // self._blocks),
            (_CHOSEN_EXPERTS, lambda value: min(value, 2)),
            (re.compile(r"n_group|num_expert_group|topk_group"), lambda value: min(value, 2)),
            (_EXPERTS, lambda value: min(value, 4)),
            (_HEADS, self._head_count),
            (_HEAD_SIZES, self._head_width),
            (_WINDOWS, lambda value: min(value, 2 * _WINDOW if value % 2 else _WINDOW)),
            (_WIDTHS, self._width),
        ]

    def _head_count(self, value: int) -> int:
        if value in {self._heads, self._groups}:
            return self._new_heads if value == self._heads else self._new_groups
        return max(1, value * self._new_heads // self._heads)

    def _head_width(self, value: int) -> int:
        return max(2, value * self._new_head_size // self._head_size // 2 * 2)

    def _width(self, value: int) -> int:
        if value == self._hidden:
            return self._new_hidden
        return max(8, -(-value * self._new_hidden // self._hidden // 8) * 8)


def _all_of(content: Any, key: str) -> list[Any]:
    if not isinstance(content, dict):
        return []
    here = [content[key]] if key in content else []
    return here + [found for part in content.values() for found in _all_of(part, key)]


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
