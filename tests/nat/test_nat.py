"""Peers behind every pair of NATs reach each other: directly, through a hole, or through a relay."""

import json
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import product
from typing import Any

import pytest

from .lab import HOMES, PUBLIC, Lab, Nat

pytestmark = [pytest.mark.nat, pytest.mark.timeout(600)]

JOINS = 100
JOIN_S = 20.0
"""Longest time from a start to the first answer of another home, on a busy machine."""
SOON_S = 5.0
"""Over a connection that is there already, also on a busy machine."""


class Peer:
    """A peer in a namespace."""

    def __init__(self, lab: Lab, space: str, seed: int, *announce: str) -> None:
        command = lab.inside(space, sys.executable, "-m", "tests.nat.peer", str(seed), *announce)
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.space = space
        self._id: str | None = None

    @property
    def id(self) -> str:
        """The peer's id, once it runs."""
        if self._id is None:
            self._id = self._read()
        assert self._id is not None
        return self._id

    def rejoin(self, seed: int) -> None:
        """Have the peer leave, and come back as another."""
        assert self.process.stdin is not None
        print("rejoin", seed, file=self.process.stdin, flush=True)
        self._id = self._read()

    def _read(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, f"the peer in {self.space} has died"
        return json.loads(line)

    def ask(self, *words: object) -> Any:
        """Return the answer to a command. Raises AssertionError for an error."""
        answer = self.try_ask(*words)
        assert "error" not in answer, answer["error"]
        return answer["ok"]

    def try_ask(self, *words: object) -> dict[str, Any]:
        assert self.id
        assert self.process.stdin is not None
        print(*words, file=self.process.stdin, flush=True)
        answer: dict[str, Any] = self._read()
        return answer

    def end(self) -> None:
        """Kill the peer, which has not said farewell to anybody."""
        self.process.kill()
        self.process.communicate()

    def address(self, host: str) -> str:
        return f"/ip4/{host}/tcp/4001/p2p/{self.id}"


def wait(condition: Callable[[], bool], peer: Peer | None = None, timeout_s: float = 60) -> None:
    end_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end_s, peer and (peer.space, peer.ask("reach"))
        time.sleep(0.1)


@contextmanager
def swarm(*kinds: Nat, delay_ms: float = 5, relays: int = 1) -> Iterator[tuple[Peer, ...]]:
    """Run public relays, and a peer in each of some homes, which knows the relays only."""
    with ExitStack() as stack:
        homes = dict(zip(HOMES, kinds, strict=False))
        lab = stack.enter_context(Lab().built(delay_ms=delay_ms, **homes))
        public = list(PUBLIC)[:relays]
        peers = tuple(Peer(lab, space, seed) for seed, space in enumerate([*public, *homes], 1))
        for peer in peers:
            stack.callback(peer.end)
        for peer in peers[relays:]:
            for relay in peers[:relays]:
                peer.ask("connect", relay.address(PUBLIC[relay.space]))
        yield peers


def settled(peer: Peer, kind: Nat, relays: int = 1) -> bool:
    """Return whether a peer knows whether it can be dialled, and has its relays if not."""
    reach = peer.ask("reach")
    if kind in {Nat.OPEN, Nat.FULL_CONE}:
        return bool(reach["verdict"] == "public")
    return bool(reach["verdict"] == "private" and len(reach["relays"]) >= relays)


def expected(kinds: tuple[Nat, Nat]) -> set[str]:
    """Return the ways that are good enough for a pair."""
    if {Nat.OPEN, Nat.FULL_CONE} & set(kinds):
        return {"direct", "punched"}
    return {"relayed"} if Nat.SYMMETRIC in kinds else {"punched"}


def goes_as_expected(one: Peer, two: Peer, kinds: tuple[Nat, Nat]) -> bool:
    """Return whether two peers reach each other in a way that is good enough, as both see it."""
    return one.ask("way", two.id) == two.ask("way", one.id) and one.ask("way", two.id) in expected(kinds)


def test_homes_behind_every_pair_of_nats_reach_each_other() -> None:
    # Two public peers: nobody alone can tell a home at which address it is seen, and reached.
    with swarm(*Nat, *Nat, delay_ms=15, relays=2) as (_, _, *homes):
        for peer, kind in zip(homes, [*Nat, *Nat], strict=True):
            wait(lambda peer=peer, kind=kind: settled(peer, kind), peer)  # type: ignore[misc]
        ones, others = homes[: len(Nat)], homes[len(Nat) :]
        for (one, kind), (two, other_kind) in product(zip(ones, Nat, strict=True), zip(others, Nat, strict=True)):
            one.ask("learn", two.id, *two.ask("addresses"))
            took_s = one.ask("echo", two.id, 1000)
            # On a busy machine the first stream goes through the relay, and the hole is there a moment later.
            wait(lambda a=one, b=two, kinds=(kind, other_kind): goes_as_expected(a, b, kinds), one)  # type: ignore[misc]
            print(f"{kind} to {other_kind}: {one.ask('way', two.id)}, first byte after {took_s:.2f} s")
            assert two.ask("echo", one.id, 1000) < SOON_S


@pytest.mark.soak
def test_none_of_a_hundred_joins_is_silent() -> None:
    """A peer joins at a home, as somebody new each time, and calls one at another, which calls back."""
    chosen = random.Random(0)
    took_s: list[float] = []
    ways: Counter[str] = Counter()
    with swarm(*Nat, *Nat, delay_ms=15, relays=2) as peers:
        relays = peers[:2]
        homes = list(zip(peers[2:], [*Nat, *Nat], strict=True))
        for number in range(JOINS):
            (one, kind), (two, other_kind) = chosen.sample(homes, 2)
            wait(lambda peer=two, kind=other_kind: settled(peer, kind), two)  # type: ignore[misc]
            one.rejoin(1000 + number)
            started_s = time.monotonic()
            for relay in relays:
                one.ask("connect", relay.address(PUBLIC[relay.space]))
            one.ask("learn", two.id, *two.ask("addresses"))
            one.ask("echo", two.id, 1000)
            took_s.append(time.monotonic() - started_s)
            assert took_s[-1] < JOIN_S, f"{kind} to {other_kind}"
            wait(lambda a=one, b=two, kinds=(kind, other_kind): goes_as_expected(a, b, kinds), one)  # type: ignore[misc]
            assert two.ask("echo", one.id, 1000) < SOON_S
            ways[one.ask("way", two.id)] += 1
    median_s, slowest_s = sorted(took_s)[len(took_s) // 2], max(took_s)
    print(f"{JOINS} joins: {dict(ways)}; first answer after {median_s:.2f} s (median), {slowest_s:.2f} s (slowest)")
