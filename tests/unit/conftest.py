"""What holds for unit tests."""

import pytest

from node.models import sources


@pytest.fixture(autouse=True)
def _no_tensor_check(monkeypatch: pytest.MonkeyPatch) -> None:
    """Import checkpoints of plain bytes, which no architecture would take, and spare each import a process with torch.

    The check has tests of its own.
    """
    monkeypatch.setattr(sources, "check_tensors", lambda *_: None)
