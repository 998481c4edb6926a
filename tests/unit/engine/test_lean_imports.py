"""What a worker of a safetensors package imports: transformers, without what only training and compiling use."""

import subprocess
import sys

import pytest

CHECK = """
import sys
from node.engine.lean_imports import import_lean
import_lean()
import node.engine.torch_shard
from transformers.models.llama.modeling_llama import LlamaForCausalLM
print(*sorted({"scipy", "sympy", "torch._dynamo.eval_frame", "torch.distributed.tensor"} & sys.modules.keys()))
"""

USE = """
from node.engine.lean_imports import import_lean
import_lean()
import torch
print(torch._dynamo.config.cache_size_limit > 0, torch.compile(lambda x: x + 1, backend="eager")(torch.ones(1)).item())
import scipy.optimize
"""


def run(program: str) -> str:
    return subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout.strip()


def test_worker_does_not_import_the_compiler_and_scipy() -> None:
    assert run(CHECK) == ""


def test_what_was_left_out_is_imported_once_it_is_used() -> None:
    assert run(USE) == "True 2.0"


@pytest.mark.parametrize("loaded", ["transformers"])
def test_comes_too_late_without_harm(loaded: str) -> None:
    program = f"import {loaded}\nfrom node.engine.lean_imports import import_lean\nimport_lean()\n"
    program += "import torch\nprint(torch.distributed.is_available())"
    assert run(program) == "True"
