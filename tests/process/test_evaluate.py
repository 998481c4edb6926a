"""`metaswarm evaluate` as its user sees it at a keyboard: Ctrl-C ends all of it at once."""

import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.unit.selector.measurements import made_up, write_folder


@pytest.mark.parametrize("ends", [signal.SIGINT, signal.SIGKILL])
def test_signal_ends_evaluation_without_orphans(tmp_path: Path, ends: signal.Signals) -> None:
    write_folder(tmp_path, made_up(contexts=2000))
    command = [sys.executable, "-m", "node", "evaluate", str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert process.stderr.readline() == "metaswarm\n"
        children: list[psutil.Process] = []
        while not children:  # they are started after the line was written
            assert process.poll() is None
            children = psutil.Process(process.pid).children()
        process.send_signal(ends)
        _, told = process.communicate(timeout=20)
    gone, alive = psutil.wait_procs(children, timeout=20)
    assert not alive
    assert gone
    assert "Traceback" not in told
    assert process.returncode == (130 if ends is signal.SIGINT else -signal.SIGKILL)
