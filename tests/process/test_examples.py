"""The examples and the notebook, each run as it is against one swarm of three real peers."""

import ast
import io
import json
import runpy
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
from anyio.from_thread import start_blocking_portal

from tests.process.daemons import THIRDS, Daemon, complete_swarm, running_daemon
from tests.support.demo_model import demo_model_with_tools

EXAMPLES = Path(__file__).parents[2] / "examples"
EXPECTED = {
    "chat": "by these peers:",
    "many_prompts": "about the number 8. '",
    "methods": "exact methods give one text: True",
    "openai_package": "3 peers, method ",
    "streaming": "tokens/s",
    "structured_output": " years old and likes ",
    "tools": 'capital_of({"country": "',
}
"""Part of what each prints."""


@asynccontextmanager
async def thirds(folder: Path, model: str) -> AsyncIterator[list[Daemon]]:
    """Run a swarm of three peers with a third of the model each."""
    async with AsyncExitStack() as stack:

        async def start(*flags: str) -> Daemon:
            data_dir = folder / flags[1].replace(":", "-")
            return await stack.enter_async_context(running_daemon(data_dir, *flags))

        daemons = await complete_swarm(start, *THIRDS, model=model)
        yield daemons
        for daemon in daemons:  # nothing here is worth draining
            await daemon.kill()


@pytest.fixture(scope="module")
def api_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The API of a swarm's peer, which runs as long as the tests of this module: its tasks are in another thread."""
    model = demo_model_with_tools().model_id
    with start_blocking_portal("trio") as portal:
        swarm = portal.wrap_async_context_manager(thirds(tmp_path_factory.mktemp("swarm"), model))
        with swarm as daemons:
            yield daemons[1].api_url


@pytest.fixture(autouse=True)
def environment(api_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("METASWARM_API", api_url)


def test_every_example_is_run() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == EXPECTED.keys()


@pytest.mark.parametrize("name", EXPECTED)
def test_example(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    assert EXPECTED[name] in capsys.readouterr().out


def test_notebook() -> None:
    """Its code cells run one after another, and print something where the kept outputs do."""
    notebook = json.loads((EXAMPLES / "notebook.ipynb").read_text(encoding="utf-8"))
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    names: dict[str, Any] = {"__name__": "__main__"}
    for cell in cells:
        printed = run_cell("".join(cell["source"]), names)
        assert bool(printed) == bool(cell["outputs"])


def run_cell(source: str, names: dict[str, Any]) -> str:
    """Run a cell; return what it shows: what it prints, and its last expression."""
    tree = ast.parse(source)
    last = tree.body.pop()
    with redirect_stdout(io.StringIO()) as printed:
        exec(compile(tree, "cell", "exec"), names)
        if not isinstance(last, ast.Expr):
            exec(compile(ast.Module([last], []), "cell", "exec"), names)
            return printed.getvalue()
        value = eval(compile(ast.Expression(last.value), "cell", "eval"), names)
    return printed.getvalue() + ("" if value is None else repr(value))
