"""Makes a tiny config of a model's config: the same architecture, patterns and ratios, with few and small blocks.

Whatever selects code is kept: kinds of blocks and their order, groups of heads, experts, rotary scaling, windows (so
short that a few tokens pass them). Sizes are divided.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

from transformers.configuration_utils import PreTrainedConfig

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


def shrink(config: PreTrainedConfig) -> dict[str, Any]:
    """Return the content of a config.json of the same model type, shrunk."""
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
