"""Conclude an epoch once for all peers of a simulation: `conclude` is a pure function, and takes most of the time."""

from collections.abc import Sequence
from typing import Any

import pytest

from selector.consensus import participant
from selector.consensus.sortition import Sortition
from selector.consensus.state import Contribution, EpochResult, State, conclude


def conclude_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have participants remember each other's results while a test runs."""
    results: dict[object, EpochResult] = {}

    def once(chain: bytes, parent: bytes, state: State, sortition: Sortition, **rest: Any) -> EpochResult:
        contributions: Sequence[Contribution] = rest["contributions"]
        key = (
            *(parent, rest["epoch"], rest["proposer"], rest["restart"], frozenset(rest["equivocators"])),
            frozenset((commit.id, reveal.inclusion) for commit, reveal in contributions),
        )
        if key not in results:
            results[key] = conclude(chain, parent, state, sortition, **rest)
        return results[key]

    monkeypatch.setattr(participant, "conclude", once)
