"""A process ends with its parent, however that ends."""

import os
import select
import subprocess
import sys

import pytest

CHILD = "from node.util.parent import end_with_parent; end_with_parent(); print('ready', flush=True); input()"
PARENT = f"""
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", {CHILD!r}], stdout=subprocess.PIPE)
child.stdout.readline()
print(child.pid, flush=True)
child.wait()
"""


@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="only Linux tells a process that another has ended")
def test_process_ends_when_its_parent_is_killed() -> None:
    # The pipe stays open, so that the child does not end for want of input.
    with subprocess.Popen([sys.executable, "-c", PARENT], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        child = os.pidfd_open(int(parent.stdout.readline()))
        parent.kill()
        ended, _, _ = select.select([child], [], [], 10)
        os.close(child)
    assert ended
