"""Spoilt frames and records cost their sender and nobody else; `benchmarks/mutations.py` takes a million of them."""

import random

import pytest

from protocol.errors import RemoteProtocolError
from tests.support.mutants import Target, mutant, targets

MUTANTS = 300


@pytest.mark.parametrize("target", targets(), ids=lambda target: target.name)
def test_what_is_valid_is_taken(target: Target) -> None:
    for seed in target.seeds:
        target.decode(seed)


@pytest.mark.parametrize("target", targets(), ids=lambda target: target.name)
def test_what_is_spoilt_is_taken_or_refused_as_the_senders_fault(target: Target) -> None:
    dice = random.Random(target.name)
    refused = 0
    for _ in range(MUTANTS):
        try:
            target.decode(mutant(dice, target.seeds))
        except RemoteProtocolError:
            refused += 1
    assert refused > MUTANTS // 4
