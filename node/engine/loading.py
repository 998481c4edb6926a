"""Builds the blocks of one span, and nothing else, out of transformers' own model classes.

The whole model is described without memory (0.1 s for 30 blocks, 0.25 s for 80), the weights of the span are mapped
from their files into it, and only then the other blocks are cut off and the config sliced. In this order, and not on a
sliced config, because a block's kind may depend on its absolute number: which are experts and which dense
(`decoder_sparse_step`, `mlp_only_layers`), which slide (`layer_types`, `max_window_layers`), how attention is scaled
(GPT-2's `scale_attn_by_inverse_layer_idx`). And names need no renumbering.

Names and tensors go through transformers' weight conversion, as they do in `from_pretrained`, because since version 5
modules and files differ: files of Mixtral and Qwen3-MoE hold three matrices for each expert, their modules two for all
experts together, which `MergeModulelist` and `Concatenate` make of them. Copying tensors by name would leave the
experts as they were initialised, silently. Here every weight that the span needs is present, or loading raises
EngineError.

Weights that need no conversion stay views of the mapped files: loading reads next to nothing, and what packs or runs
them reads them. As published, the matrices of the blocks, of the embedding and of the head keep the two bytes of bf16
and fp16; all else is f32.
"""

import copy
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.configuration_utils import PreTrainedConfig
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig, PreTrainedModel, local_torch_dtype
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.utils.loading_report import LoadStateDictInfo

from node.engine.empty_weights import without_weights
from node.engine.interface import EngineError, ShardSource
from node.engine.kv_cache import attention_windows
from node.engine.mapped_files import MappedFile
from node.engine.outer_modules import OuterModules, accepted_options, trace_outer_modules
from node.models.layout import OuterNames, describe_tensors, module_of
from node.models.manifest import architecture_name, constant_positions
from node.util.text import one_line
from protocol.identity import BlockRange

_BLOCK_LISTS = frozenset({"layers", "h", "blocks"})
_NUMBERS = frozenset({"layer_idx", "layer_id"})

_CPU = torch.device("cpu")

NARROW_DTYPES = frozenset({torch.bfloat16, torch.float16})
"""Floats of two bytes, whose every number f32 has, too."""

_WIDENED_SHARE = 0.75
"""Of the memory, that weights may take as f32; larger ones stay as published, and are widened at each use."""

# Ignored in a config from elsewhere: code, kernels, devices.
_FOREIGN_KEYS = frozenset({"auto_map", "attn_implementation", "experts_implementation", "fusion_config", "device_map"})


@dataclass(frozen=True, slots=True)
class LoadedSpan:
    """A model of transformers that consists of one span's blocks.

    `base`: the model without its head. `blocks`: the blocks themselves. `windows`: the sliding window of each, None
    for full attention. `is_first`, `is_last`: whether it holds the model's first or last block. `block_files`,
    `outer_files`: that its weights are views of, of each block and of the modules around them.
    """

    model: PreTrainedModel
    base: nn.Module
    blocks: nn.ModuleList
    windows: tuple[int | None, ...]
    is_first: bool
    is_last: bool
    block_count: int
    hidden_size: int
    vocabulary_size: int
    max_positions: int | None
    weight_bytes: int
    block_files: tuple[MappedFile, ...]
    outer_files: tuple[MappedFile, ...]

    @property
    def device(self) -> torch.device:
        """Where the weights lie."""
        return next(self.blocks.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The type of the blocks' matrices."""
        return next(weight.dtype for weight in self.blocks.parameters() if weight.dim() > 1)

    @property
    def is_bf16(self) -> bool:
        """Whether every matrix is in bf16."""
        return {weight.dtype for weight in self.model.parameters() if weight.dim() > 1} == {torch.bfloat16}

    @property
    def element_count(self) -> int:
        """How many numbers the weights are."""
        return sum({weight.data_ptr(): weight.numel() for weight in self.model.parameters()}.values())

    def with_own_modules(self) -> "LoadedSpan":
        """Return the span in modules of its own over the same weights, which take no memory again.

        So a thread may put other weights into these modules while another one reads those of the first.
        """
        shared = (*self.model.parameters(), *self.model.buffers(), *self.block_files, *self.outer_files)
        return copy.deepcopy(self, {id(each): each for each in shared})

    def drop_pages(self) -> None:
        """Give the memory of the mapped files back; what is used after that is read again."""
        for file in (*self.block_files, *self.outer_files):
            file.drop_pages()


class Absent(nn.Module):
    """Replaces a module whose weights belong to another stage; its output is not used.

    The forward pass of a stage still runs through its neighbours' parts: position embeddings, embedding norms, the
    final norm. The shard puts in and takes out hidden states right at its blocks, so any output will do that lets the
    pass go on: the input itself, or zero for an embedding.
    """

    def forward(self, *inputs: Any, **_options: Any) -> torch.Tensor:
        """Return the first input if it has the form of hidden states, else a zero."""
        first = inputs[0] if inputs else None
        return first if isinstance(first, torch.Tensor) and first.dim() == 3 else torch.zeros(())


def load_span(
    source: ShardSource,
    blocks: BlockRange,
    dtype: torch.dtype | None,
    device: torch.device = _CPU,
    limit_bytes: int | None = None,
    described: "DescribedModel | None" = None,
) -> LoadedSpan:
    """Build the blocks of a span with weights mapped from their files, and from there copied to another device.

    `dtype`: of the weights in memory; None for the one they were published in, which is also taken where another takes
    too much of `limit_bytes`. `described`: the model of `source`, which becomes the span. Raises EngineError if the
    span cannot be served.
    """
    described = described or describe(source.config)
    config, model, path = described.config, described.model, described.path
    block_count = config.num_hidden_layers
    if blocks.end > block_count:
        raise EngineError(f"the model has blocks 0-{block_count}, not {blocks}")
    try:
        block_files, outer_files = _map_files(source, blocks)
        weights = {
            _name_in_decoder(name): tensor for file in (*outer_files, *block_files) for name, tensor in file.tensors()
        }
    except (OSError, ValueError) as error:
        raise EngineError(f"blocks {blocks} cannot be loaded: {one_line(error)}") from error
    elements, held_bytes = sum(each.numel() for each in weights.values()), sum(each.nbytes for each in weights.values())
    if dtype is not None and limit_bytes is not None and elements * dtype.itemsize > limit_bytes * _WIDENED_SHARE:
        dtype = None
    needed_bytes = held_bytes if dtype is None else elements * dtype.itemsize
    if limit_bytes is not None and needed_bytes > limit_bytes:
        raise EngineError(f"{limit_bytes} bytes of memory are not enough: the weights take {needed_bytes}")
    if dtype is None:
        _keep_dtypes(described, weights)
    report = _load(model, weights)
    _check_buffers(model, report.missing_keys, described.names, blocks, block_count)
    _cut(model, path, described.outer, blocks, block_count)
    # The config that the forward pass reads describes the span's blocks alone.
    for key, value in list(vars(config).items()):
        if isinstance(value, list) and len(value) == block_count and re.search("layer|block|attention", key):
            setattr(config, key, value[blocks.start : blocks.end])
    config.num_hidden_layers = len(blocks)
    span = model.eval().to(device).get_submodule(path)
    assert isinstance(span, nn.ModuleList)
    return LoadedSpan(
        model=model,
        base=described.base,
        blocks=span,
        windows=described.windows[blocks.start : blocks.end],
        is_first=blocks.start == 0,
        is_last=blocks.end == block_count,
        block_count=block_count,
        hidden_size=config.hidden_size,
        vocabulary_size=config.vocab_size,
        max_positions=constant_positions(config.to_dict()),
        weight_bytes=sum({p.data_ptr(): p.numel() * p.element_size() for p in model.parameters()}.values()),
        block_files=block_files,
        outer_files=outer_files,
    )


@dataclass(frozen=True, slots=True)
class DescribedModel:
    """A whole model without its weights, of an architecture whose blocks can be served.

    `base`: the model without its head. `path`: where its list of blocks stands. `windows`: the sliding window of each.
    """

    config: PreTrainedConfig
    model: PreTrainedModel
    base: nn.Module
    path: str
    windows: tuple[int | None, ...]
    outer: OuterModules

    @property
    def names(self) -> OuterNames:
        """The modules around the blocks, by their names in any checkpoint."""
        paths = {module: module_of(path) for path, module in self.model.named_modules()}
        return OuterNames(
            embed=frozenset(map(module_of, self.outer.before)),
            head=frozenset(map(module_of, self.outer.behind)),
            output=paths.get(self.model.get_output_embeddings(), ""),
            input=paths.get(self.model.get_input_embeddings(), ""),
        )


def describe(content: Mapping[str, Any]) -> DescribedModel:
    """Return the model that the content of a config.json describes; raise EngineError if it cannot be split."""
    config = config_from(content)
    name = name_of(config)
    if config.is_encoder_decoder:
        raise EngineError(f"{name} is an encoder-decoder: only decoders are served here")
    try:
        windows = attention_windows(config)
    except EngineError:
        raise
    except Exception as error:  # for some, transformers itself knows no cache
        raise EngineError(f"{name} keeps more than keys and values, so it cannot be split into spans here") from error
    model = _describe(config)
    path = _find_blocks(model, config, name)
    base = model.get_submodule(path.partition(".")[0])
    if "past_key_values" not in accepted_options(base.forward):
        raise EngineError(f"{name} keeps no keys and values of past positions, so it cannot be split into spans here")
    try:
        outer = trace_outer_modules(model, base, path)
    except EngineError as error:
        raise EngineError(f"{name} cannot be split into spans here: {error}") from error
    return DescribedModel(config, model, base, path, windows, outer)


def name_of(config: PreTrainedConfig) -> str:
    """Return the name of an architecture, with transformers' identifier."""
    return f"{architecture_name(config.model_type)} ({config.model_type})"


def check_weights(content: Mapping[str, Any], tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> None:
    """Compare a checkpoint's tensors, by name, with what its config's architecture needs, without reading any.

    Raises EngineError for one that is missing, has another shape, or has no place in the model.
    """
    model = _describe(config_from(content))
    weights = {
        _name_in_decoder(name): torch.empty(shape, dtype=dtype, device="meta")
        for name, (dtype, shape) in tensors.items()
    }
    report = _load(model, weights, "meta")
    missing = set(report.missing_keys)
    for target, source in model.all_tied_weights_keys.items():
        if not {target, source} <= missing:  # one of the two names is enough
            missing -= {target, source}
    if missing:
        raise EngineError(f"it lacks {describe_tensors(sorted(missing))}")
    ignored = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_unexpected or ()]  # noqa: SLF001
    unexpected = sorted(name for name in report.unexpected_keys if not any(pattern.search(name) for pattern in ignored))
    if unexpected:
        raise EngineError(f"it has {describe_tensors(unexpected)}, which its architecture does not use")


def config_from(content: Mapping[str, Any]) -> PreTrainedConfig:
    """Return the decoder's config in a config.json."""
    values = {key: value for key, value in content.items() if key not in _FOREIGN_KEYS and not key.startswith("_")}
    model_type = values.pop("model_type", None)
    if values.get("quantization_config") is not None:
        raise EngineError("the model's weights are quantised in an unsupported format: import unquantised ones")
    if model_type not in CONFIG_MAPPING:
        raise EngineError(f"transformers does not know the architecture {str(model_type)[:80]!r}")
    try:
        config = CONFIG_MAPPING[model_type](**_with_infinities(values)).get_text_config(decoder=True)
    except Exception as error:  # each architecture checks its config in its own way; any complaint is about the config
        raise EngineError(f"the model's config is not valid: {one_line(error)}") from error
    assert isinstance(config, PreTrainedConfig)
    return config


def _with_infinities(value: Any) -> Any:
    """Decode numbers that JSON has not, as transformers writes them: {"__float__": "Infinity"}."""
    if isinstance(value, dict):
        if value.keys() == {"__float__"}:
            return float(value["__float__"])
        return {key: _with_infinities(part) for key, part in value.items()}
    return [_with_infinities(part) for part in value] if isinstance(value, list) else value


def _describe(config: PreTrainedConfig) -> PreTrainedModel:
    """Return the whole model without memory for its weights; buffers, such as rotary frequencies, are computed."""
    model_class: object = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if not isinstance(model_class, type) or not issubclass(model_class, PreTrainedModel):
        raise EngineError(f"{name_of(config)} cannot be served: transformers has no causal decoder for it")
    try:
        with local_torch_dtype(torch.float32), without_weights():
            return model_class(config)
    except Exception as error:  # sizes that do not match show only here
        raise EngineError(f"the model's config is not valid: {one_line(error)}") from error


def _find_blocks(model: PreTrainedModel, config: PreTrainedConfig, name: str) -> str:
    found: list[str] = [
        path
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and path.count(".") > 0
        and path.rpartition(".")[2] in _BLOCK_LISTS
        and len(module) == getattr(config, "num_hidden_layers", None)
    ]
    if not found:
        raise EngineError(f"{name} cannot be served: it is not a plain stack of decoder blocks")
    return found[0]


def _map_files(source: ShardSource, blocks: BlockRange) -> tuple[tuple[MappedFile, ...], tuple[MappedFile, ...]]:
    """Map the files of the blocks of a span, and of the modules around them. Raises OSError, ValueError."""
    for block in range(blocks.start, blocks.end):
        if block not in source.block_files:
            raise EngineError(f"the file of block {block} is not given")
    outer = [MappedFile(file) for file in (source.embed_file, source.head_file) if file is not None]
    inner = [MappedFile(source.block_files[block]) for block in range(blocks.start, blocks.end)]
    return tuple(inner), tuple(outer)


def _keep_dtypes(described: DescribedModel, weights: Mapping[str, torch.Tensor]) -> None:
    """Have the matrices of blocks, embedding and head loaded in the dtype of their files, if that is a narrow one."""
    model = described.model
    conversions = _conversions(model)
    state = model.state_dict()
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    outer = {embedding if isinstance(embedding, nn.Embedding) else None, head if type(head) is nn.Linear else None}
    renamings = [step for step in conversions if isinstance(step, WeightRenaming)]
    converters = [step for step in conversions if isinstance(step, WeightConverter)]
    for name, tensor in weights.items():
        target, converter = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        if converter is not None or target not in state or tensor.dtype not in NARROW_DTYPES or tensor.dim() < 2:
            continue
        owner, _, attribute = target.rpartition(".")
        module = model.get_submodule(owner)
        if attribute in module._parameters and (target.startswith(f"{described.path}.") or module in outer):  # noqa: SLF001
            empty = torch.empty(state[target].shape, dtype=tensor.dtype, device="meta")
            setattr(module, attribute, nn.Parameter(empty, requires_grad=False))


def _name_in_decoder(name: str) -> str:
    """Return a tensor's name; the decoder of a multimodal checkpoint stands one level deeper than the same alone."""
    return name.replace("language_model.", "", 1)


def _conversions(model: PreTrainedModel) -> list[WeightConverter | WeightRenaming]:
    return [step for step in get_model_conversion_mapping(model) if isinstance(step, WeightConverter | WeightRenaming)]


def _load(model: PreTrainedModel, weights: dict[str, torch.Tensor], device: str = "cpu") -> LoadStateDictInfo:
    """Put weights into the model; those that need no conversion stay views of their files. Return what is missing.

    Each becomes of the dtype that the model has described for it.
    """
    settings = LoadStateDictConfig(dtype=torch.float32, weight_mapping=_conversions(model), device_map={"": device})
    report: LoadStateDictInfo
    report, _ = convert_and_load_state_dict_in_model(model, weights, settings, None)
    faults = [
        *report.error_msgs,
        *report.conversion_errors.values(),
        *(f"{name} has shape {list(found)}, not {list(wanted)}" for name, found, wanted in report.mismatched_keys),
    ]
    if faults:
        raise EngineError(f"the weights do not fit the model's config: {one_line(faults[0])}")
    # Of the two names of a tied matrix the files have one, and stages in the middle none.
    if any(source not in report.missing_keys for source in model.all_tied_weights_keys.values()):
        model.tie_weights(missing_keys=set(report.missing_keys), recompute_mapping=False)
    return report


def _check_buffers(
    model: PreTrainedModel, missing: Iterable[str], outer: OuterNames, blocks: BlockRange, block_count: int
) -> None:
    """Raise EngineError for a missing buffer of the span that checkpoints store (such as a router's bias).

    Parameters are checked when the span has been cut out.
    """
    here = {*range(blocks.start, blocks.end)}
    for name in sorted({name for name, _ in model.named_buffers()}.intersection(missing)):
        part = outer.part_of(name)
        if part in here or (part == "embed" and blocks.start == 0) or (part == "head" and blocks.end == block_count):
            raise EngineError(f"the model's files lack {name}")


def _cut(model: PreTrainedModel, path: str, outer: OuterModules, blocks: BlockRange, block_count: int) -> None:
    """Cut off other stages' blocks, and replace their other modules by `Absent`."""
    parent, _, name = path.rpartition(".")
    layers = model.get_submodule(path)
    assert isinstance(layers, nn.ModuleList)
    kept = nn.ModuleList(layers[blocks.start : blocks.end])
    setattr(model.get_submodule(parent), name, kept)
    for module in kept.modules():
        # It names the layer of the cache; what depends on the absolute number was settled when the block was made.
        for number in _NUMBERS & vars(module).keys():
            if isinstance(absolute := getattr(module, number), int):
                setattr(module, number, absolute - blocks.start)
    elsewhere = {part for part, here in (("embed", blocks.start == 0), ("head", blocks.end == block_count)) if not here}
    absent: set[str] = set()
    for weight, tensor in list(model.named_parameters(remove_duplicate=False)):
        owner = weight.rpartition(".")[0]
        if any(f"{owner}.".startswith(f"{above}.") for above in absent):
            continue
        if outer.part_of(weight) in elsewhere and not path.startswith(f"{owner}."):
            model.set_submodule(owner, Absent())
            absent.add(owner)
        elif tensor.is_meta:
            raise EngineError(f"the model's files lack {weight}")
