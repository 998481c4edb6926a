"""What the run over all selectors asks of each."""

import numpy as np
import pytest

from node.evaluation.compare import compare
from selector.dataset import FloatArray, Pairs
from selector.metamodel import MetaModel
from tests.unit.selector.measurements import made_up


def test_compare_passes_the_number_of_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: set[int] = set()

    def scores(self: MetaModel, X: Pairs, count: int) -> FloatArray:  # noqa: N803
        asked.add(count)
        return np.zeros(len(X))

    monkeypatch.setattr(MetaModel, "fit", lambda self, X, y, sample_weight=None: self)  # noqa: N803
    monkeypatch.setattr(MetaModel, "probe_scores", scores)
    compare(made_up(contexts=12), "random", probes=3)
    assert asked == {3}
