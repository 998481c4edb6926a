"""The layers that ARCHITECTURE shows are those that `make lint` enforces."""

import ast
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

LINT = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))"


PACKAGES = ("node", "protocol", "selector", "metaswarm_client")


def lint(folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", LINT], cwd=folder, env={"PYTHONPATH": str(folder)}, capture_output=True, text=True
    )


@pytest.mark.parametrize(
    ("module", "line", "contract"),
    [
        ("node/stages/scheduler.py", "import node.coordinator.job", "Layers of the node"),
        ("node/network/interface.py", "import node.stages.scheduler", "Layers of the node"),
        ("protocol/limits.py", "import selector.task", "Layers of the whole"),
        ("protocol/limits.py", "import protocol.codec", "protocol: the values"),
        ("selector/task.py", "import protocol.canonical", "selector imports the value modules"),
        ("node/stages/span.py", "import libp2p", "Only node.network imports libp2p"),
        ("node/coordinator/job.py", "import torch", "Only node.engine imports torch"),
        ("metaswarm_client/client.py", "import node.config", "The Python client knows nothing"),
        ("metaswarm_client/async_client.py", "import trio", "The Python client knows nothing"),
        ("node/app.py", "import node.testing.fake_engine", "no fake"),
        ("node/stages/scheduler.py", "import node.stages.span", "No import cycles"),
    ],
)
def test_lint_fails_when_an_import_breaks_a_contract(tmp_path: Path, module: str, line: str, contract: str) -> None:
    for package in PACKAGES:
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    with (tmp_path / module).open("a") as file:
        file.write(f"\n{line}\n")
    result = lint(tmp_path)
    assert result.returncode == 1, result.stdout + result.stderr
    broken = [each for each in result.stdout.splitlines() if each.endswith("BROKEN")]
    assert any(contract in each for each in broken), result.stdout


def test_architecture_lists_every_layer() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    layers = next(contract["layers"] for contract in contracts if contract.get("containers") == ["node"])
    rooms = [room for layer in layers for room in layer.replace("|", " ").replace(":", " ").split()]
    text = (ROOT / "ARCHITECTURE.md").read_text()
    missing = [room for room in rooms if f"`node/{room}/`" not in text and f"`node/{room}.py`" not in text]
    assert missing == ["__main__"]


def sources() -> dict[str, ast.Module]:
    files = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
    return {str(path.relative_to(ROOT)): ast.parse(path.read_text(encoding="utf-8")) for path in files}


def test_modules_functions_and_constructors_stay_small() -> None:
    large = []
    for file, tree in sources().items():
        if (lines := len((ROOT / file).read_text(encoding="utf-8").splitlines())) >= 450:
            large.append(f"{file}: {lines} lines")
        for each in ast.walk(tree):
            if isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef):
                arguments = [*each.args.posonlyargs, *each.args.args, *each.args.kwonlyargs]
                if each.end_lineno is None or each.end_lineno - each.lineno >= 59:
                    large.append(f"{file}: {each.name} is too long")
                if each.name == "__init__" and len(arguments) > 9:
                    large.append(f"{file}:{each.lineno}: a constructor with {len(arguments) - 1} arguments")
    assert large == []
