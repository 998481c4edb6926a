"""The types that weights are published in, and their bits."""

import re
from typing import Final

USUAL_WEIGHT_BITS: Final = 16.0
"""Assumed where the type is unknown."""

_SCALES: Final = {
    "q2_k": 0.63, "q3_k": 0.44, "q4_0": 0.5, "q4_1": 1.0, "q4_k": 0.5, "q5_0": 0.5, "q5_1": 1.0, "q5_k": 0.5,
    "q6_k": 0.56, "q8_0": 0.5, "iq4_nl": 0.5, "iq4_xs": 0.25, "mxfp4": 0.25,
}  # fmt: skip
"""Bits a weight of the scales and offsets of GGUF's quantised types."""


def bits_per_weight(weight_type: str) -> float | None:
    """Return the bits of a weight with its share of the scales: those in the type's name (`bf16`, `q4_k`) and more.

    None where the type is unknown.
    """
    found = re.search(r"\d+", weight_type)
    if not found or not (bits := int(found[0][:3])):
        return None
    return bits + _SCALES.get(weight_type, 0.0)
