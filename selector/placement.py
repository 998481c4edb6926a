"""Which blocks a node should serve: the stretch that the swarm needs most, within what the node can hold."""

from collections.abc import Sequence


def choose_span(coverage: Sequence[int], holds: int) -> tuple[int, int]:
    """Return the blocks (start, end) to serve.

    `coverage` counts for each block the peers that serve it; `holds` is how many blocks fit here, at least one. The
    stretch with the most blocks that nobody serves wins, then the one that is served least, then the first.
    """
    length = min(holds, len(coverage))
    if length < 1:
        raise ValueError("a node that holds no block serves nothing")
    unserved = _window_sums([count == 0 for count in coverage], length)
    served = _window_sums(coverage, length)
    start = min(range(len(served)), key=lambda i: (-unserved[i], served[i], i))
    return start, start + length


def _window_sums(values: Sequence[int], length: int) -> list[int]:
    """Return the sum of every window of `length` values."""
    sums = [sum(values[:length])]
    for i in range(length, len(values)):
        sums.append(sums[-1] + values[i] - values[i - length])
    return sums
