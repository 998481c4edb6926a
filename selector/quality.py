"""The quality bound of a job, and which lossy methods it admits."""

from dataclasses import dataclass

from protocol.measurements import QualityBound
from selector.task import Method


@dataclass(frozen=True, slots=True)
class MeasuredQuality:
    """Effect of a lossy method on a model's output, relative to the reference of its package format.

    `perplexity_change`: relative, 0.01 is one per cent more. `mean_kl`: mean KL divergence in nats.
    `greedy_agreement`: share of positions with equal greedy tokens; no bound depends on it.
    """

    perplexity_change: float
    mean_kl: float
    greedy_agreement: float | None = None


def admits(bound: QualityBound, candidate: Method, quality: MeasuredQuality | None) -> bool:
    """Return whether a quality bound admits a method; a lossy one only if it was measured for the model."""
    if candidate.exact:
        return True
    if quality is None or bound is QualityBound.EXACT:
        return False
    if bound is QualityBound.NEAR:
        return quality.perplexity_change <= 0.01 and quality.mean_kl <= 0.02
    return quality.perplexity_change <= 0.05
