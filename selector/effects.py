"""What a context costs by itself and what a method adds to it: the additive part of a table with holes."""

from dataclasses import dataclass

import numpy as np

from selector.dataset import FloatArray, Pairs, context_means, context_minima

SWEEPS = 10


@dataclass(frozen=True, slots=True, eq=False)
class Effects:
    """`cost ≈ of_context[context] + of_method[method]`, in natural logarithms; 0 for a method never measured.

    `support`: how much was measured of each method.
    """

    of_context: FloatArray
    of_method: FloatArray
    support: FloatArray


def fit_effects(pairs: Pairs, cost: FloatArray, weight: FloatArray, shrinkage: float = 1.0) -> Effects:
    """Return both effects by alternating weighted means.

    Unlike the plain mean of each context it compares a context where only slow methods were measured fairly with one
    where all were. `shrinkage`: as if so many measurements had shown each method to be average.
    """
    contexts, methods = len(pairs.contexts), len(pairs.methods)
    support: FloatArray = np.asarray(np.bincount(pairs.method, weights=weight, minlength=methods), dtype=np.float64)
    of_method: FloatArray = np.zeros(methods)
    of_context = context_means(cost, pairs.context, contexts, weight)
    for _ in range(SWEEPS):
        excess = weight * (cost - of_context[pairs.context])
        of_method = np.bincount(pairs.method, weights=excess, minlength=methods) / (support + shrinkage)
        of_context = context_means(cost - of_method[pairs.method], pairs.context, contexts, weight)
    return Effects(of_context, of_method, support)


def mean_regrets(pairs: Pairs, cost: FloatArray, weight: FloatArray) -> FloatArray:
    """Return each method's mean distance from the best that was measured in the same context; infinity if never."""
    best = context_minima(cost, pairs.context, len(pairs.contexts))
    support = np.bincount(pairs.method, weights=weight, minlength=len(pairs.methods))
    sums = np.bincount(pairs.method, weights=weight * (cost - best[pairs.context]), minlength=len(pairs.methods))
    return np.where(support > 0, sums / np.maximum(support, 1e-300), np.inf)
