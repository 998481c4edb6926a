"""The rotary embedding of a GGUF file: its scaling, as llama.cpp applies it, and the equivalent config.

A file states it by keys (`rope.scaling.*`: none, linear, YaRN) or by tensors with one factor for each frequency
(`rope_freqs`: Llama 3.1 and later; `rope_factors_long`, `rope_factors_short`: LongRoPE). Of Llama 3 only the factors
are in the file, not the four parameters that a config must have: these are reconstructed, and checked against every
factor.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from node.models.gguf_file import GgufError, GgufModel

SHORT_FACTORS: Final = "rope_factors_short.weight"
LONG_FACTORS: Final = "rope_factors_long.weight"
_FREQS: Final = "rope_freqs.weight"
ROPE_TENSORS: Final = frozenset({_FREQS, LONG_FACTORS, SHORT_FACTORS})
"""Tensors that the rotary embedding takes; no layer does."""

_KEYS: Final = (
    "dimension_count freq_base scale_linear scaling.attn_factor scaling.factor scaling.finetuned "
    "scaling.original_context_length scaling.type scaling.yarn_attn_factor scaling.yarn_beta_fast "
    "scaling.yarn_beta_slow scaling.yarn_ext_factor scaling.yarn_log_multiplier"
)
ROPE_KEYS: Final = frozenset(f"rope.{key}" for key in _KEYS.split())
"""Keys of the architecture's namespace that are read here."""

PRECISION: Final = 4e-6
"""Relative tolerance between frequencies calculated in 32-bit floats in two ways."""

_LLAMA3_CONTEXT: Final = 8192
_LLAMA3_FACTORS: Final = (8.0, 32.0)
_BETA_FAST, _BETA_SLOW = 32.0, 1.0


@dataclass(frozen=True, slots=True)
class Rope:
    """A rotary embedding: its `rope_parameters` in a config, the resulting frequencies, and the attention factor."""

    parameters: Mapping[str, object]
    frequencies: tuple[float, ...]
    attention_factor: float = 1.0

    @staticmethod
    def plain(dimensions: int, base: float) -> "Rope":
        """Return the embedding without scaling."""
        return Rope({"rope_type": "default", "rope_theta": base}, _frequencies(dimensions, base))

    def differs(self, frequencies: list[float], attention_factor: float) -> bool:
        """Return whether an embedding that was built is another one than this."""
        is_same_factor = math.isclose(attention_factor, self.attention_factor, rel_tol=PRECISION)
        return not is_same_factor or not _are_close(frequencies, self.frequencies)


def read_rope(model: GgufModel, dimensions: int, tensors: Mapping[str, tuple[float, ...]]) -> Rope:
    """Return the rotary embedding of a file; raise GgufError, naming key or tensor, for one that cannot be kept."""
    base = model.number("rope.freq_base", 10000.0)
    if base <= 0 or dimensions % 2:
        raise model.unsupported("rope.freq_base" if base <= 0 else "rope.dimension_count")
    for name, factors in tensors.items():
        if len(factors) != dimensions // 2 or not all(math.isfinite(factor) and factor > 0 for factor in factors):
            raise GgufError(f"{model.name}: tensor {name} does not fit its {dimensions // 2} frequencies")
    kind = model.get("rope.scaling.type") or "linear"
    factor = model.number("rope.scaling.factor", 0.0) or model.number("rope.scale_linear", 0.0) or 1.0
    if kind == "none":
        factor = 1.0
    if kind == "longrope" or LONG_FACTORS in tensors or SHORT_FACTORS in tensors:
        return _longrope(model, dimensions, base, factor, tensors)
    if kind not in {"none", "linear", "yarn"} or factor <= 0:
        raise model.unsupported("rope.scaling.type" if factor > 0 else "rope.scaling.factor")
    _require(model, "rope.scaling.attn_factor", 1.0)
    _require(model, "rope.scaling.yarn_log_multiplier", 0.0)
    factors = tensors.get(_FREQS, ())
    if any(factor != 1.0 for factor in factors):
        if factor != 1.0 or model.architecture != "llama":
            raise GgufError(f"{model.name}: RoPE scaling by both {_FREQS} and keys, or of this architecture, "
                            "cannot be kept: import the model's safetensors checkpoint")  # fmt: skip
        return _llama3(model, dimensions, base, factors)
    if kind == "yarn" and factor != 1.0:
        return _yarn(model, dimensions, base, factor)
    if factor == 1.0:
        return Rope.plain(dimensions, base)
    frequencies = tuple(frequency / factor for frequency in _frequencies(dimensions, base))
    return Rope({"rope_type": "linear", "rope_theta": base, "factor": factor}, frequencies)


def _require(model: GgufModel, key: str, wanted: float) -> None:
    if model.number(key, wanted) != wanted:
        raise model.unsupported(key)


def _context(model: GgufModel, default: int | None = None) -> int:
    key = "rope.scaling.original_context_length"
    return model.integer(key) if model.get(key) else default or model.integer("context_length")


def _yarn(model: GgufModel, dimensions: int, base: float, factor: float) -> Rope:
    _require(model, "rope.scaling.yarn_ext_factor", 1.0)
    _require(model, "rope.scaling.yarn_attn_factor", 1.0)
    context = _context(model)
    fast = model.number("rope.scaling.yarn_beta_fast", _BETA_FAST)
    slow = model.number("rope.scaling.yarn_beta_slow", _BETA_SLOW)
    if fast <= 0 or slow <= 0 or factor < 1:
        raise model.unsupported("rope.scaling.type")

    def turns_at(rotations: float) -> float:
        return dimensions * math.log(context / (rotations * 2 * math.pi)) / (2 * math.log(base))

    low, high = max(math.floor(turns_at(fast)), 0), min(math.ceil(turns_at(slow)), dimensions - 1)
    frequencies = []
    for number, frequency in enumerate(_frequencies(dimensions, base)):
        ramp = min(max((number - low) / max(high - low, 0.001), 0.0), 1.0)
        frequencies.append(frequency / factor * ramp + frequency * (1 - ramp))
    parameters = {
        "rope_type": "yarn",
        "rope_theta": base,
        "factor": factor,
        "original_max_position_embeddings": context,
        "beta_fast": fast,
        "beta_slow": slow,
    }
    return Rope(parameters, tuple(frequencies), 0.1 * math.log(factor) + 1.0)


def _longrope(
    model: GgufModel, dimensions: int, base: float, factor: float, tensors: Mapping[str, tuple[float, ...]]
) -> Rope:
    """Return LongRoPE with its factors for texts up to the original context length, which are built first."""
    if (
        model.architecture != "phi3"
        or not {LONG_FACTORS, SHORT_FACTORS} <= tensors.keys()
        or factor != 1.0
        or _FREQS in tensors
    ):
        raise model.unsupported("rope.scaling.type")
    context = _context(model)
    attention_factor = model.number("rope.scaling.attn_factor", 1.0)
    frequencies = tuple(
        frequency / short
        for frequency, short in zip(_frequencies(dimensions, base), tensors[SHORT_FACTORS], strict=True)
    )
    parameters = {
        "rope_type": "longrope",
        "rope_theta": base,
        "original_max_position_embeddings": context,
        "attention_factor": attention_factor,
        "long_factor": list(tensors[LONG_FACTORS]),
        "short_factor": list(tensors[SHORT_FACTORS]),
    }
    return Rope(parameters, frequencies, attention_factor)


def _llama3(model: GgufModel, dimensions: int, base: float, factors: tuple[float, ...]) -> Rope:
    plain = _frequencies(dimensions, base)
    context = _context(model, _LLAMA3_CONTEXT)
    for factor, low, high in _llama3_candidates(plain, factors, context):
        again = [_llama3_factor(frequency, factor, low, high, context) for frequency in plain]
        if _are_close(again, factors):
            parameters = {
                "rope_type": "llama3",
                "rope_theta": base,
                "factor": factor,
                "low_freq_factor": low,
                "high_freq_factor": high,
                "original_max_position_embeddings": context,
            }
            scaled = tuple(frequency / by for frequency, by in zip(plain, factors, strict=True))
            return Rope(parameters, scaled)
    raise GgufError(
        f"{model.name}: the RoPE scaling in tensor {_FREQS} is not that of Llama 3, and cannot be kept: "
        "import the model's safetensors checkpoint"
    )


def _llama3_candidates(
    plain: tuple[float, ...], factors: tuple[float, ...], context: int
) -> Iterator[tuple[float, float, float]]:
    """Yield factor, low and high frequency factor: the published ones, then estimates from the factors themselves.

    Between the two thresholds the unscaled share of a frequency rises in proportion to the frequency; so two
    frequencies there determine both.
    """
    largest = max(factors)
    for factor in (*_LLAMA3_FACTORS, largest):
        yield factor, 1.0, 4.0
    turns = [frequency * context / (2 * math.pi) for frequency in plain]
    shares = [(1 / factor - 1 / largest) / (1 - 1 / largest) for factor in factors] if largest > 1 else []
    between = [(turn, share) for turn, share in zip(turns, shares, strict=False) if PRECISION < share < 1 - PRECISION]
    scaled = max((turn for turn, share in zip(turns, shares, strict=False) if share <= PRECISION), default=0.0)
    unscaled = min(
        (turn for turn, share in zip(turns, shares, strict=False) if share >= 1 - PRECISION), default=math.inf
    )
    if len(between) >= 2:
        (first, high_share), (last, low_share) = between[0], between[-1]
        if high_share > low_share:
            low = last - low_share * (first - last) / (high_share - low_share)
            high = low + (first - last) / (high_share - low_share)
            yield largest, round(low), round(high)
            yield largest, low, high
    elif between:
        (turn, share), *_ = between
        width = min((turn - scaled) / share, (unscaled - turn) / (1 - share)) / 2
        yield largest, turn - share * width, turn + (1 - share) * width
    elif 0 < scaled < unscaled < math.inf:
        ratio = (unscaled / scaled) ** (1 / 3)
        yield largest, scaled * ratio, scaled * ratio * ratio


def _llama3_factor(frequency: float, factor: float, low: float, high: float, context: int) -> float:
    turns = frequency * context / (2 * math.pi)
    if turns > high or high <= low:
        return 1.0
    if turns < low:
        return factor
    share = (turns - low) / (high - low)
    return 1 / ((1 - share) / factor + share)


def _frequencies(dimensions: int, base: float) -> tuple[float, ...]:
    return tuple(base ** (-2 * number / dimensions) for number in range(dimensions // 2))


def _are_close(built: Sequence[float], wanted: Sequence[float]) -> bool:
    pairs = zip(built, wanted, strict=False)
    return len(built) == len(wanted) and all(math.isclose(*pair, rel_tol=PRECISION) for pair in pairs)
