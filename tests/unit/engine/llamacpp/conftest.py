"""SmolLM2 as it was published, and as a package; once for all tests."""

import gc
from collections.abc import Iterator

import pytest

from tests.support.demo_model import demo_gguf
from tests.unit.engine.llamacpp.packages import Alone, GgufFiles, write_package


@pytest.fixture(scope="session")
def smol(tmp_path_factory: pytest.TempPathFactory) -> GgufFiles:
    return write_package(demo_gguf(), tmp_path_factory.mktemp("smol"))


@pytest.fixture(scope="session")
def smol_alone(smol: GgufFiles) -> Alone:
    return smol.alone()


@pytest.fixture(autouse=True)
def freed() -> Iterator[None]:
    """Free the spans of each test."""
    yield
    gc.collect()
