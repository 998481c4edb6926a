"""The weight of a peer's readings: the log odds that they support the agreed value.

Log odds are the weights with which a vote of independent voters errs least (Nitzan and Paroush, 1982).
"""

from collections.abc import Mapping
from typing import Final

from protocol.consensus_values import Member
from protocol.identity import PeerId

COUNT_SCALE: Final = 1024
"""One agreement or deviation, in the fixed point of `Member`, so that counts can decay in integer arithmetic."""

WEIGHT_SCALE: Final = 1024
"""A weight of one natural unit of log odds."""

DECAY_SHIFT: Final = 7
"""With each epoch in which a peer was compared, a 128th of its record decays."""

_PRIOR_AGREED: Final = 2 * COUNT_SCALE
_PRIOR_DEVIATED: Final = 1 * COUNT_SCALE
_LN2: Final = 710
"""ln 2 in WEIGHT_SCALE."""
_LOG_BITS: Final = 10


def updated(member: Member, agreed: int, deviated: int) -> Member:
    """Return a member after an epoch with these further agreements and deviations, in COUNT_SCALE."""
    if not agreed and not deviated:
        return member
    return member._replace(
        agreed=member.agreed - (member.agreed >> DECAY_SHIFT) + agreed,
        deviated=member.deviated - (member.deviated >> DECAY_SHIFT) + deviated,
    )


def weight_of(member: Member) -> int:
    """Return the log odds in WEIGHT_SCALE, never below 0: readings that mostly deviate are ignored, not inverted."""
    log_odds = _log2(member.agreed + _PRIOR_AGREED) - _log2(member.deviated + _PRIOR_DEVIATED)
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


NEWCOMER_WEIGHT: Final = weight_of(Member(PeerId(""), ""))
"""A newcomer has some weight: ln 2."""


def relative_trust(weights: Mapping[str, int]) -> tuple[dict[str, float], float]:
    """Return the trust in each member of a chain, from 0 to 1, and in every other peer, by the members' weights.

    It is the weight relative to the largest one. Where there is none every peer is trusted.
    """
    most = max(weights.values(), default=0)
    if not most:
        return {}, 1.0
    return {peer: weight / most for peer, weight in weights.items()}, min(1.0, NEWCOMER_WEIGHT / most)
