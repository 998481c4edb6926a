"""Processes beside the node's work give way to those who serve jobs, also where Linux weighs sessions first."""

import subprocess
import sys
from pathlib import Path

import pytest

AUTOGROUP = Path("/proc/self/autogroup")
PROGRAM = f"""
import os
from pathlib import Path
from node.util.priority import yield_to_others
yield_to_others()
print(os.nice(0))
print(Path({str(AUTOGROUP)!r}).read_text() if Path({str(AUTOGROUP)!r}).exists() else "")
"""


@pytest.mark.parametrize("own_session", [True, False])
def test_yielding_lowers_priority_of_process_and_own_session(own_session: bool) -> None:
    before = AUTOGROUP.read_text() if AUTOGROUP.exists() else ""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, check=True, start_new_session=own_session, text=True
    )
    nice, *session = done.stdout.split()
    assert nice == "19"
    # A session that Linux doesn't weigh has no line here: the first one of the machine, or one in a control group.
    if own_session and session:
        assert session[-1] == "19"
    assert not before or AUTOGROUP.read_text() == before, "ours is weighed as it was"
