"""Names of tensors in error messages."""

import re
from collections import defaultdict
from collections.abc import Iterable
from itertools import pairwise

_NUMBERED = re.compile(r"(?:.*?\.)?(?:blk|layers|h|blocks)\.(\d{1,6})\.")
_SHOWN = 4


def describe_tensors(names: Iterable[str]) -> str:
    """Return tensors in a few words: those of blocks by block, of the others the first ones."""
    blocks: defaultdict[int, list[str]] = defaultdict(list)
    others: list[str] = []
    for name in names:
        block = _NUMBERED.match(name)
        if block is None:
            others.append(name)
        else:
            blocks[int(block[1])].append(name)
    shown = []
    if blocks:
        numbers = sorted(blocks)
        runs = [str(numbers[0])]
        for before, number in pairwise(numbers):
            if number != before + 1:
                runs.append(str(number))
            elif "-" in runs[-1]:
                runs[-1] = f"{runs[-1].partition('-')[0]}-{number}"
            else:
                runs[-1] += f"-{number}"
        example = min(blocks[numbers[0]])
        many = "s" if len(numbers) > 1 else ""
        shown.append(f"tensors of block{many} {', '.join(runs[:8])} ({example[:100]}, …)")
    shown += [f"{name[:100]}" for name in others[:_SHOWN]]
    more = f" and {len(others) - _SHOWN} more" if len(others) > _SHOWN else ""
    return ", ".join(shown) + more
