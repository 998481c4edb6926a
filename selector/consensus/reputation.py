"""How far a peer's readings are believed: the log odds of its having agreed with what came to be agreed.

Log odds are the weights with which a vote of independent voters errs least (Nitzan and Paroush, 1982).
"""

from typing import Final, NamedTuple

COUNT_SCALE: Final = 1024
"""Agreements are counted in these, so that old ones can fade in integer arithmetic."""

WEIGHT_SCALE: Final = 1024
"""A weight of one natural unit of log odds."""

FADE_SHIFT: Final = 7
"""With each epoch in which a peer was compared, a 128th of its record fades: what it does now counts."""

_PRIOR_AGREED: Final = 2 * COUNT_SCALE
_PRIOR_DEVIATED: Final = 1 * COUNT_SCALE
_LN2: Final = 710
"""ln 2 in WEIGHT_SCALE."""
_LOG_BITS: Final = 10


class Reputation(NamedTuple):
    """How often a peer agreed and how often it deviated, in COUNT_SCALE; it fades."""

    agreed: int = 0
    deviated: int = 0

    def after(self, agreed: int, deviated: int) -> "Reputation":
        """Return the reputation after so many more agreements and deviations."""
        if not agreed and not deviated:
            return self
        return Reputation(
            self.agreed - (self.agreed >> FADE_SHIFT) + agreed * COUNT_SCALE,
            self.deviated - (self.deviated >> FADE_SHIFT) + deviated * COUNT_SCALE,
        )

    @property
    def weight(self) -> int:
        """The log odds in WEIGHT_SCALE, never below 0: who deviates more than it agrees is not turned round.

        A newcomer has a little weight: ln 2.
        """
        log_odds = _log2(self.agreed + _PRIOR_AGREED) - _log2(self.deviated + _PRIOR_DEVIATED)
        return max(0, log_odds * _LN2 >> _LOG_BITS)


def _log2(value: int) -> int:
    """Return the logarithm to the base 2 of a positive integer, in 1 / 1024, rounded down. Integers only."""
    exponent = value.bit_length() - 1
    mantissa = (value << 62) >> exponent  # from 2**62 to below 2**63
    result = exponent
    for _ in range(_LOG_BITS):
        mantissa = (mantissa * mantissa) >> 62
        result <<= 1
        if mantissa >> 63:
            mantissa >>= 1
            result |= 1
    return result


NEWCOMER_WEIGHT: Final = Reputation().weight
