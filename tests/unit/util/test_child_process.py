import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from node.util.child_process import ChildError, run, run_blocking, running, start
from node.util.interpreter import child_environment, python
from tests.support import hostile_directory

ROOT = Path(__file__).parents[3]
PROGRAM = "import json, node, numpy, protocol; print(node.__file__)"


@pytest.fixture
def mark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Work in a directory of hostile modules; none of them may have been imported at the end."""
    mark = hostile_directory.fill(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(["", ".", "relative"]))
    yield mark
    assert not mark.exists(), mark.read_text()


@pytest.mark.usefixtures("mark")
async def test_child_does_not_import_from_current_directory() -> None:
    command = python("-c", PROGRAM)
    expected = str(ROOT / "node" / "__init__.py")
    assert (await run(command, what="it", time_limit_s=30)).decode().strip() == expected
    assert run_blocking(command, what="it", time_limit_s=30).strip() == expected
    with running(command, what="it") as blocking:
        assert blocking.process.stdout is not None
        assert blocking.process.stdout.read().strip() == expected
        blocking.check()
    child = await start(command, what="it", stdout=True)
    assert (await child.stdout.receive_some()).decode().strip() == expected
    await child.kill()


@pytest.mark.usefixtures("mark")
async def test_grandchild_does_not_import_from_current_directory() -> None:
    inner = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {PROGRAM!r}], check=True)"
    assert await run(python("-c", inner), what="it", time_limit_s=30)


@pytest.mark.usefixtures("mark")
@pytest.mark.parametrize("flags", [["-P"], []])
def test_command_line_works_in_hostile_directory(flags: list[str], mark: Path) -> None:
    # Without -P a folder of the same name as the package is found first; nothing else there is.
    (mark.parent / "node" / "__init__.py").unlink()
    (mark.parent / "node").rmdir()
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *flags, "-m", "node", "doctor", "--help"], env=environment, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_child_environment_is_sanitised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONSTARTUP", "/tmp/startup.py")
    monkeypatch.setenv("PYTHONINSPECT", "1")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(["", "here", "/opt/modules"]))
    environment = child_environment({"OMP_NUM_THREADS": "1"})
    assert not environment.keys() & {"PYTHONSTARTUP", "PYTHONINSPECT"}
    assert environment["PYTHONPATH"].split(os.pathsep)[-1] == "/opt/modules"
    assert all(Path(path).is_absolute() for path in environment["PYTHONPATH"].split(os.pathsep))
    assert (environment["PYTHONSAFEPATH"], environment["OMP_NUM_THREADS"]) == ("1", "1")
    assert "HOME" not in child_environment(base={"LANG": "C"})


@pytest.mark.parametrize(
    ("program", "message"),
    [
        ("import sys; sys.exit('first\\nno such device\\n\\n')", "the child exited with 1: no such device"),
        ("import os; os._exit(3)", "the child exited with 3"),
        ("import os; os.write(2, b'out of paper'); os.abort()", "the child was killed by SIGABRT: out of paper"),
        ("import os, signal; os.write(2, b'old'); os.kill(os.getpid(), 9)", "the child was killed by SIGKILL"),
    ],
)
async def test_error_includes_last_line_of_stderr(program: str, message: str) -> None:
    command = python("-c", program)
    with pytest.raises(ChildError) as caught:
        await run(command, what="the child", time_limit_s=30)
    assert str(caught.value) == message
    with pytest.raises(ChildError) as caught:
        run_blocking(command, what="the child", time_limit_s=30)
    assert str(caught.value) == message
    with pytest.raises(ChildError) as caught, running(command, what="the child") as blocking:
        blocking.check()
    assert str(caught.value) == message
    child = await start(command, what="the child", stdin=True, stdout=True)
    assert await child.stdout.receive_some() == b""
    assert str(await child.exit_reason()) == message
    await child.kill()


async def test_stderr_of_child_is_forwarded_live(capfd: pytest.CaptureFixture[str]) -> None:
    program = "import sys; print('printed', flush=True); print('warned', file=sys.stderr); sys.stdin.read()"
    child = await start(python("-c", program), what="it", stdin=True)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(child.relay_stderr)
        with trio.fail_after(30):
            while child.last_line != "warned":
                await trio.testing.wait_all_tasks_blocked(0.01)
        await child.stdin.aclose()
    await child.kill()
    assert capfd.readouterr().err.split() == ["printed", "warned"]


async def test_child_is_killed_on_timeout() -> None:
    command = python("-c", "import time; time.sleep(600)")
    with pytest.raises(ChildError, match=r"^it took longer than 0\.2 s$"):
        await run(command, what="it", time_limit_s=0.2)
    with pytest.raises(ChildError, match=r"^it took longer than 0\.2 s$"):
        run_blocking(command, what="it", time_limit_s=0.2)


async def test_missing_program_cannot_be_started() -> None:
    for starting in (run(["/nowhere"], what="it", time_limit_s=1), start(["/nowhere"], what="it")):
        with pytest.raises(ChildError, match=r"^it cannot be started: No such file or directory$"):
            await starting
    with pytest.raises(ChildError, match="it cannot be started"), running(["/nowhere"], what="it"):
        pass
