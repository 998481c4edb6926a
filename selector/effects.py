"""Additive main effects of contexts and methods in an incomplete table of costs."""

from dataclasses import dataclass

import numpy as np

from selector.dataset import FloatArray, Pairs, context_means, context_minima

SWEEPS = 10

PRIOR_WEIGHT = 1.0
"""Of a prior that each method is average."""


@dataclass(frozen=True, slots=True, eq=False)
class Effects:
    """`cost ≈ of_context[context] + of_method[method]`, in natural logarithms; 0 for a method never measured."""

    of_context: FloatArray
    of_method: FloatArray


def fit_effects(pairs: Pairs, cost: FloatArray, weight: FloatArray) -> Effects:
    """Return both effects, fitted by alternating weighted means.

    Unlike a plain mean per context, this allows for which methods were measured there.
    """
    contexts, methods = len(pairs.contexts), len(pairs.methods)
    support: FloatArray = np.asarray(np.bincount(pairs.method, weights=weight, minlength=methods), dtype=np.float64)
    of_method: FloatArray = np.zeros(methods)
    of_context = context_means(cost, pairs.context, contexts, weight)
    for _ in range(SWEEPS):
        excess = weight * (cost - of_context[pairs.context])
        of_method = np.bincount(pairs.method, weights=excess, minlength=methods) / (support + PRIOR_WEIGHT)
        of_context = context_means(cost - of_method[pairs.method], pairs.context, contexts, weight)
    return Effects(of_context, of_method)


def mean_regrets(pairs: Pairs, cost: FloatArray) -> FloatArray:
    """Return each method's mean regret against the best measured in the same context; infinity if never measured.

    A context counts once, as it does in the measures, however often it was measured.
    """
    best = context_minima(cost, pairs.context, len(pairs.contexts))
    support = np.bincount(pairs.method, minlength=len(pairs.methods))
    sums = np.bincount(pairs.method, weights=cost - best[pairs.context], minlength=len(pairs.methods))
    return np.where(support > 0, sums / np.maximum(support, 1), np.inf)
