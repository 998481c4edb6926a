import os
from collections.abc import Callable

import pytest
import torch

from tests.unit.engine.tiny_models import TinyModel, tiny_model

# Progress bars and remarks on tiny configs say nothing here.
os.environ |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error"}
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def make_tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], TinyModel]:
    """Return a function that makes the tiny model of a family, once."""
    made: dict[str, TinyModel] = {}

    def make(family: str) -> TinyModel:
        if family not in made:
            made[family] = tiny_model(family, tmp_path_factory.mktemp("tiny"))
        return made[family]

    return make
