from itertools import pairwise

from node.util.samples import Samples


def test_keeps_all_samples_until_the_limit_then_every_second() -> None:
    samples: Samples[int] = Samples(8)
    for number in range(7):
        samples.add(number)
    assert samples.all() == list(range(7))
    for number in range(7, 100):
        samples.add(number)
    kept = samples.all()
    assert len(kept) < 8
    assert kept[0] == 0
    assert len({after - before for before, after in pairwise(kept)}) == 1, "equal intervals"
    assert kept[-1] > 80
