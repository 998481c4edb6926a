"""Descriptions of contexts and methods in words, and their encoders, for the text-embedding baseline."""

import re
from collections.abc import Callable, Sequence
from typing import Final

import numpy as np
from sklearn.feature_extraction.text import HashingVectorizer

from selector.dataset import Contexts, FloatArray, IntArray, Pairs

Encoder = Callable[[Sequence[str]], FloatArray]
"""Encodes texts as vectors, shape (texts, width)."""

_WORDS: Final = {
    "model": {
        "l_params": "billion parameters", "l_active": "billion active parameters", "layers": "layers",
        "l_hidden": "hidden size", "gqa": "query heads per KV head", "l_hd": "head size",
        "ff_ratio": "feed-forward ratio",
    },
    "hardware": {
        "l_bf": "FLOP/s", "l_bw": "bytes/s memory bandwidth", "l_mem": "bytes of memory",
        "l_link": "bytes/s interconnect",
    },
    "workload": {
        "l_isl": "input tokens", "l_osl": "output tokens", "l_bs": "batch size", "l_tp": "tensor parallel",
    },
}  # fmt: skip
"""The three descriptions of a context, and the columns that each is made of."""

_NAMED: Final = {"model": "model", "hardware": "hardware", "workload": "budget"}
MAX_OTHERS: Final = 12


def describe_contexts(contexts: Contexts, indices: IntArray) -> list[list[str]]:
    """Return the model, hardware and workload descriptions of these contexts."""
    known = any(name in words for words in _WORDS.values() for name in contexts.columns)
    found = []
    for what, words in _WORDS.items():
        columns = [(j, words[name], name.startswith("l_")) for j, name in enumerate(contexts.columns) if name in words]
        if what == "workload" and not known:
            columns = [(j, name, False) for j, name in enumerate(contexts.columns[:MAX_OTHERS])]
        name, values = _NAMED[what], contexts.names.get(_NAMED[what])
        texts = []
        for i in indices:
            row = contexts.features[i]
            figures = [f"{_figure(row[j], is_log2)} {word}" for j, word, is_log2 in columns if np.isfinite(row[j])]
            texts.append(", ".join([what if values is None else f"{name} {values[i]}", *figures]))
        found.append(texts)
    return found


def describe_method(method: str) -> str:
    """Return a method's name in words."""
    return "method " + re.sub(r"[|=_]+", " ", method)


def texts_of(pairs: Pairs) -> set[str]:
    """Return all descriptions of these pairs' contexts and methods."""
    described = describe_contexts(pairs.contexts, np.unique(pairs.context))
    return {*(text for texts in described for text in texts), *(describe_method(method) for method in pairs.methods)}


def _figure(value: float, is_log2: bool) -> str:
    return f"{2.0 ** min(value, 1000.0) if is_log2 else value:.3g}"


class HashedNgrams:
    """Hashed counts of character n-grams: an encoder that needs no model."""

    def __init__(self, width: int = 256) -> None:
        self.width = width

    def __call__(self, texts: Sequence[str]) -> FloatArray:
        """Return one unit vector per text."""
        hashed = HashingVectorizer(analyzer="char_wb", ngram_range=(2, 4), n_features=self.width)
        vectors: FloatArray = hashed.transform(texts).toarray()
        return vectors


class KnownTexts:
    """Precomputed vectors of another encoder, which need not be present in the worker processes."""

    def __init__(self, texts: Sequence[str], vectors: FloatArray) -> None:
        self._row = {text: i for i, text in enumerate(texts)}
        self._vectors = vectors

    def __call__(self, texts: Sequence[str]) -> FloatArray:
        """Return one vector per text. Raises KeyError for a text that was not encoded."""
        return self._vectors[[self._row[text] for text in texts]]
