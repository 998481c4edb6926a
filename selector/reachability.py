"""Which peers can open a stream to which, by what they announce of themselves. No I/O.

A private peer is reached through its relays, or from within its own network. What is not known does not stand in the
way: peers that announce nothing, and networks that nobody has seen from outside.
"""

from typing import NamedTuple


class Location(NamedTuple):
    """Where a peer is: `networks` are the addresses under which others see its network, empty where unknown."""

    private: bool = False
    networks: frozenset[str] = frozenset()
    relays: tuple[str, ...] = ()
    endpoint_dependent: bool = False
    """Its NAT maps its port to another one for each destination, so that no hole can be punched."""


def are_apart(a: Location, b: Location) -> bool:
    """Return whether two peers are known to be in different networks."""
    return bool(a.networks and b.networks) and a.networks.isdisjoint(b.networks)


def can_open(sender: Location, receiver: Location) -> bool:
    """Return whether a peer can dial another, directly or through a relay of that one."""
    return not receiver.private or bool(receiver.relays) or not are_apart(sender, receiver)


def is_relayed(a: Location, b: Location) -> bool:
    """Return whether what two peers say to each other passes a relay: a hole can be punched only with fixed ports."""
    return a.private and b.private and are_apart(a, b) and (a.endpoint_dependent or b.endpoint_dependent)
