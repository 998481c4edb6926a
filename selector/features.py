"""Features of pairs: factors of method names, context features, and roofline estimates.

A method is described by the factors of its name, separated by `|`: `vLLM|tp4`, or `switch=value|…`. What is learned of
one method carries over to every method that shares a factor with it. The roofline model [Williams, Waterman, Patterson,
CACM 2009] gives the times to read weights and KV cache and to compute the products, for the method's own arithmetic and
number of devices; features that need a column absent from the dataset are left out.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import Final, Self

import numpy as np

from selector.dataset import Contexts, FloatArray, Pairs

MAX_CATEGORIES: Final = 32
"""Values of a named column, or factors of methods, with an indicator column: the most frequent ones."""

_NUMBER: Final = re.compile(r"^(?:([^=]+)=)?([A-Za-z_+-]*?)(\d+(?:\.\d+)?)$")
_PARALLEL: Final = frozenset({"tp", "pp", "dp", "ep", "cp", "gpu", "gpus", "devices"})
_PARTS: Final = re.compile(r"\||[_-](?=(?:tp|pp|dp|ep|cp|gpus?|devices)=?\d)")
"""Between what names the arithmetic and the devices: `bf16_tp8` is as good as `bf16|tp8`."""

_BITS: Final = (
    ("fp4", 4), ("int4", 4), ("w4", 4), ("awq", 4), ("gptq", 4), ("bnb", 4), ("bitsandbytes", 4), ("fp8", 8),
    ("e4m3", 8), ("e5m2", 8), ("int8", 8), ("w8", 8), ("smoothquant", 8), ("bf16", 16), ("bfloat16", 16), ("fp16", 16),
    ("float16", 16), ("half", 16), ("fp32", 32), ("float32", 32),
)  # fmt: skip
_SMOOTHQUANT: Final = re.compile(r"(?<![a-z])sq(?![a-z])")
_WEIGHTS_AND_ACTIVATIONS: Final = re.compile(r"(?<![a-z])w([1-9]\d?)a([1-9]\d?)(?!\d)")
_WEIGHT_DIGIT: Final = re.compile(
    r"(?<![a-z])(?:[it]?q|(?:bnb|bitsandbytes|awq|gptq|nf)[ _-]?(?:int|nf|fp|w)?)([1-8])(?!\d)"
    r"|(?<!\d)([1-8])[ _-]?bits?(?![a-z])"
)
"""Formats of weights alone by the digit in their names: GGUF's (`q4_k_m`, `iq2_xs`), `bnb4`, `gptq-int8`, `8bit`."""

_WEIGHT_ONLY: Final = re.compile(r"wo$|_wo|weight|awq|gptq|bnb|bitsandbytes|=int8$|=int4$|^int4")


@dataclass(frozen=True, slots=True)
class Arithmetic:
    """Arithmetic of a method: bits of a weight, of a KV element and of a product's factor, and devices."""

    weight_bits: float
    kv_bits: float
    compute_bits: float
    devices: float


_PUBLISHED: Final = "native"
"""The arithmetic of methods that compute with the weights as published."""


def arithmetic_of(method: str) -> Arithmetic:
    """Return the arithmetic that a method's name implies; 16 bits and one device by default."""
    weight_bits = kv_bits = compute_bits = 16.0
    devices = 1.0
    for factor in _PARTS.split(method.lower()):
        number = _NUMBER.match(factor)
        if number and (number[2] or number[1]) in _PARALLEL:
            devices *= max(1.0, float(number[3])) if (number[2] or number[1]) in {"tp", "pp", "cp"} else 1.0
            continue
        if factor.endswith(f"={_PUBLISHED}"):  # the context has their bits; products are of eight
            weight_bits, compute_bits = 32.0, 8.0
            continue
        if (bits := _bits(factor.removeprefix("kv"))) is None:
            continue
        if factor.startswith(("kv", "cache")):
            kv_bits = bits[0]
        elif not factor.startswith("activations"):
            weight_bits, compute_bits = bits
    return Arithmetic(weight_bits, kv_bits, compute_bits, devices)


def _bits(factor: str) -> tuple[float, float] | None:
    """Return the bits of a weight and of a product's factor that a part of a name implies; None if it implies none."""
    if both := _WEIGHTS_AND_ACTIVATIONS.search(factor):
        return float(both[1]), float(both[2])
    if digit := _WEIGHT_DIGIT.search(factor):
        return float(digit[1] or digit[2]), 16.0
    if _SMOOTHQUANT.search(factor):
        return 8.0, 8.0
    bits = next((float(bits) for word, bits in _BITS if word in factor), None)
    return None if bits is None else (bits, 16.0 if _WEIGHT_ONLY.search(factor) else bits)


@dataclass(frozen=True, slots=True)
class MethodTable:
    """Factors of methods as a matrix: indicators, then log2 of the numbers that factors end in."""

    tokens: tuple[str, ...]
    numbers: tuple[str, ...]

    @classmethod
    def of(cls, methods: Sequence[str]) -> "MethodTable":
        """Return the table that distinguishes these methods."""
        counts = Counter(token for method in methods for token in set(method.split("|")))
        tokens = [t for t, n in sorted(counts.items(), key=lambda item: (-item[1], item[0])) if n < len(methods)]
        numbers = Counter(found[0] for token in counts if (found := _number(token)))
        return cls(tuple(tokens[: 2 * MAX_CATEGORIES]), tuple(sorted(k for k, n in numbers.items() if n > 1)))

    def matrix(self, methods: Sequence[str]) -> FloatArray:
        """Return one row per method."""
        table = np.zeros((len(methods), len(self.tokens) + len(self.numbers)))
        for i, method in enumerate(methods):
            for token in method.split("|"):
                if token in self.tokens:
                    table[i, self.tokens.index(token)] = 1.0
                if (found := _number(token)) and found[0] in self.numbers:
                    table[i, len(self.tokens) + self.numbers.index(found[0])] = np.log2(1.0 + found[1])
        return table


def _number(token: str) -> tuple[str, float] | None:
    found = _NUMBER.match(token)
    return (f"{found[1] or ''}={found[2]}", float(found[3])) if found else None


PHYSICS: Final = ("total", "decode", "prefill", "memory_over_compute", "fill", "weight_bits", "kv_bits", "compute_bits",
                  "devices", "gain", "gain_of_decode", "gain_of_prefill", "communication",
                  "decode_over_prefill")  # fmt: skip
"""Columns of `physics`. Gains are relative to the times of a plain method, communication to the total."""

RELATIVE_PHYSICS: Final = tuple(PHYSICS.index(name) for name in PHYSICS if name not in {"total", "decode", "prefill"})
"""The features among them. Absolute times tell contexts apart rather than methods: on new hardware they mislead."""

PLAIN: Final = Arithmetic(weight_bits=16.0, kv_bits=16.0, compute_bits=16.0, devices=1.0)
"""Arithmetic of a method whose name implies none."""


@np.errstate(all="ignore")  # missing figures propagate as NaN, and impossible ones as infinity
def physics(pairs: Pairs) -> FloatArray:
    """Return the roofline estimates of every pair as log2, shape (pairs, count); NaN where a column is missing."""
    if not len(pairs) or not {"l_params", "l_bw", "l_bf"} <= set(pairs.contexts.columns):
        return np.full((len(pairs), len(PHYSICS)), np.nan)
    facts = np.array([astuple(arithmetic_of(method)) for method in pairs.methods])
    own, plain = _roofline(pairs, facts[pairs.method]), _roofline(pairs, np.tile(astuple(PLAIN), (len(pairs), 1)))
    return np.column_stack([own[:, :-1], own[:, :3] - plain[:, :3], own[:, -1], own[:, 1] - own[:, 2]])


def _roofline(pairs: Pairs, table: FloatArray) -> FloatArray:
    """Return the columns of `physics` without the gains. `table`: each pair's `Arithmetic`, shape (pairs, 4)."""
    contexts = pairs.contexts

    def of(name: str, default: float = np.nan) -> FloatArray:
        found = contexts.column(name)
        return np.full(len(pairs), default) if found is None else found[pairs.context]

    weight_bits, kv_bits, compute_bits, devices = np.log2(table).T
    weight_bits = np.fmin(weight_bits, of("l_weight_bits"))  # no wider than they were published
    devices = devices + of("l_tp", 0.0)
    active = of("l_active") if "l_active" in contexts.columns else of("l_params")
    rate = of("l_bf") + np.where(compute_bits <= 2, of("l_f4", 0.0), np.where(compute_bits <= 3, of("l_f8", 0.0), 0.0))
    rate = rate + np.where(compute_bits >= 5, of("l_f32", -1.0), 0.0)
    weight_bytes = of("l_params") + 30 + weight_bits - 3
    kv_bytes = np.log2(np.maximum(of("kvgb"), 1e-6)) + 30 + kv_bits - 4
    # The sequences of a batch choose different experts, up to all of them.
    read_weights = np.fmin(of("l_params"), active + of("l_bs", 0.0)) + 30 + weight_bits - 3
    read = np.logaddexp2(read_weights, kv_bytes) - of("l_bw") - devices
    multiply = active + 31 + of("l_bs", 0.0) - rate - devices
    decode = np.maximum(read, multiply) + of("l_osl", 0.0)
    prefill = np.maximum(multiply + of("l_isl", 0.0), weight_bytes - of("l_bw") - devices)
    total = np.logaddexp2(decode, prefill)
    memory = of("l_mem") if "l_mem" in contexts.columns else np.log2(np.maximum(of("memgb"), 1e-6)) + 30
    fill = np.logaddexp2(weight_bytes, kv_bytes) - memory - devices
    # Two all-reduces per layer, each of 2 (n - 1) / n times the activations in 16 bits.
    share = np.log2(np.maximum(1.0 - 2.0**-devices, 2.0**-10))
    tokens = of("l_bs", 0.0) + np.logaddexp2(of("l_isl", 0.0), of("l_osl", 0.0))
    exchanged = np.log2(of("layers")) + of("l_hidden") + tokens + share + 3.0 - of("l_link")
    return np.column_stack(
        [total, decode, prefill, read - multiply, fill, weight_bits, kv_bits, compute_bits, devices, exchanged - total]
    )


@dataclass(frozen=True, slots=True, eq=False)
class ContextTable:
    """Contexts as a matrix: the features that vary in training, and indicators of the budget.

    `centre`, `scale`: median and standard deviation of each kept column. NaN: unknown.
    """

    kept: tuple[int, ...]
    budgets: tuple[str, ...]
    centre: FloatArray
    scale: FloatArray

    @classmethod
    def of(cls, contexts: Contexts) -> "ContextTable":
        """Return the table that distinguishes these contexts."""
        table = _finite(contexts.features)
        kept = tuple(j for j in range(table.shape[1]) if _differs(table[:, j]))
        centre = np.array([np.nanmedian(table[:, j]) for j in kept])
        scale = np.array([np.nanstd(table[:, j]) for j in kept])
        budgets: tuple[str, ...] = ()
        if "budget" in contexts.names:
            values, counts = np.unique(contexts.names["budget"], return_counts=True)
            if len(values) > 1:
                budgets = tuple(values[np.argsort(-counts, kind="stable")][:MAX_CATEGORIES].tolist())
        return cls(kept, budgets, centre, scale)

    def matrix(self, contexts: Contexts) -> FloatArray:
        """Return one row per context, in the units of the dataset."""
        table = _finite(contexts.features)[:, list(self.kept)]
        return np.hstack([table, self._indicators(contexts)])

    def standardised(self, contexts: Contexts) -> FloatArray:
        """Return one row per context with standardised columns; missing values are 0."""
        table = (_finite(contexts.features)[:, list(self.kept)] - self.centre) / self.scale
        return np.hstack([np.clip(np.nan_to_num(table), -5.0, 5.0), self._indicators(contexts)])

    def _indicators(self, contexts: Contexts) -> FloatArray:
        if not self.budgets:
            return np.zeros((len(contexts), 0))
        indicators: FloatArray = (contexts.names["budget"][:, None] == np.array(self.budgets)).astype(np.float64)
        return indicators


FAMILIAR: Final = 0.05
"""Distance of a figure from the nearest in training up to which it is familiar, in standard deviations of the column.

Left out at random, contexts are nearer (95 % within 0.02 in shardops); of hardware or models left out hardly any are.
"""


class Familiarity:
    """Whether contexts lie among those of the training data, so that they are interpolated, or beyond them.

    It is told column by column: hardware and models that were seen, though not together, are familiar.
    """

    def fit(self, pairs: Pairs) -> Self:
        """Store the values of every column, also of those that are equal everywhere: other ones are beyond them."""
        table = _finite(pairs.contexts.features[np.unique(pairs.context)])
        self._known = [np.unique(column[np.isfinite(column)]) for column in table.T]
        self._scale = [
            float(np.nanstd(column)) or 1.0 if len(known) else 1.0
            for column, known in zip(table.T, self._known, strict=True)
        ]
        return self

    def of(self, pairs: Pairs) -> FloatArray:
        """Return for each pair 1 in a familiar context, 0 from twice that distance on. Missing figures are familiar."""
        used, position = np.unique(pairs.context, return_inverse=True)
        table = _finite(pairs.contexts.features[used])
        distance = np.zeros(len(used))
        for column, known, scale in zip(table.T, self._known, self._scale, strict=True):
            if len(known):
                after = np.searchsorted(known, column)
                below, above = known[np.maximum(after - 1, 0)], known[np.minimum(after, len(known) - 1)]
                nearest = np.minimum(np.abs(column - below), np.abs(column - above))
                distance = np.fmax(distance, nearest / scale)
        familiar: FloatArray = np.clip(2.0 - distance / FAMILIAR, 0.0, 1.0)[position]
        return familiar


class PairTable:
    """Pairs as a matrix: context features, method factors and, on request, roofline estimates."""

    def fit(self, pairs: Pairs) -> Self:
        """Select the columns that vary among these pairs."""
        used = np.unique(pairs.context)
        self.contexts_ = ContextTable.of(pairs.contexts.take(used))
        self.methods_ = MethodTable.of([pairs.methods[i] for i in np.unique(pairs.method)])
        table = physics(pairs)
        self.physics_ = [j for j in RELATIVE_PHYSICS if _differs(table[:, j])]
        return self

    def transform(self, pairs: Pairs, *, roofline: bool) -> FloatArray:
        """Return one row per pair."""
        contexts = self.contexts_.matrix(pairs.contexts)[pairs.context]
        methods = self.methods_.matrix(pairs.methods)[pairs.method]
        if not roofline:
            return np.hstack([contexts, methods])
        return np.hstack([contexts, methods, _finite(physics(pairs)[:, self.physics_])])


def _finite(table: FloatArray) -> FloatArray:
    """Return the table with NaN for every value that is not finite in single precision."""
    return np.where(np.abs(table) < 1e30, table, np.nan)


def _differs(column: FloatArray) -> bool:
    known = column[np.isfinite(column)]
    return len(known) > 1 and bool(np.ptp(known) > 1e-30)  # less is nothing in single precision, and squares of it 0
