"""A node that one command starts for itself, as a process of its own, and ends with it."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from tempfile import TemporaryDirectory
from typing import Final, NoReturn

from node.cli.options import environment_without
from node.cli.output import CommandError, err
from node.config import ENVIRONMENT_PREFIX, NodeReady
from node.engine.device import CPU
from node.util.child_process import BlockingChild, ChildError, running
from node.util.interpreter import child_environment, python

STOP_TIMEOUT_S: Final = 15.0
"""Longest wait for the node to leave before it is killed."""

_OF_OWN_NODE: Final = (
    *("api", "api_key", "api_keys", "cors_origin", "listen", "announce", "bootstrap", "serve", "draft", "log_format"),
)
"""Options of the user's own node that do not apply to this one: how it is reached, and what it serves."""


@contextmanager
def local_node(serve: str | None, bootstrap: Sequence[str], *, share_data_dir: bool) -> Iterator[str]:
    """Run a node inside the block and yield its API's URL.

    Only this machine reaches its API. `serve`: a model, all blocks that fit, for this machine only; without, and with
    `bootstrap`, it joins a swarm and brings no blocks. `share_data_dir`: it runs in the user's data directory, where
    other verbs find it and what it learns is kept; else in a temporary one. Other settings of the user's environment
    and configuration file hold.
    """
    flags = ["--json", "--api", "127.0.0.1:0"]
    if not bootstrap:
        flags.append("--no-mdns")
    for each in bootstrap:
        flags += ["--bootstrap", each]
    if serve is None:
        flags += ["--listen", "/ip4/0.0.0.0/tcp/0", "--no-port-mapping", "--device", CPU]
    else:
        flags += ["--listen", "/ip4/127.0.0.1/tcp/0", "--serve", serve]
    what = f"a node that serves {serve}" if serve else "a node"
    with TemporaryDirectory(prefix="metaswarm-", ignore_cleanup_errors=True) as folder:
        if not share_data_dir:
            flags += ["--data-dir", folder]
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(ENVIRONMENT_PREFIX)}
        environment = child_environment(base=inherited | environment_without(_OF_OWN_NODE))
        command = python("-m", "node", "node", *flags)
        # In a session of its own: Ctrl-C is for the answer that is being shown.
        with _exit_on_signals(), running(command, what=what, environment=environment, own_session=True) as child:
            try:
                yield _wait_ready(child, what).api_url
            finally:
                _stop(child)


def _wait_ready(child: BlockingChild, what: str) -> NodeReady:
    """Wait until the node prints its addresses; say meanwhile on a terminal what is being waited for."""
    assert child.process.stdout is not None
    with err().status(f"starting {what}; `metaswarm node` keeps one running"):
        line = child.process.stdout.readline()
    if not line:
        try:
            child.check()
        except ChildError as error:
            raise CommandError(str(error)) from None
    return NodeReady.parse(line)


def _stop(child: BlockingChild) -> None:
    """Shut the node down gracefully; Ctrl-C meanwhile kills it."""
    child.process.terminate()
    with suppress(subprocess.TimeoutExpired):
        child.process.wait(STOP_TIMEOUT_S)


@contextmanager
def _exit_on_signals() -> Iterator[None]:
    """Leave the block also where this process is ended from outside: the node would outlive it."""

    def leave(number: int, _: object) -> NoReturn:
        sys.exit(128 + number)

    numbers = (signal.SIGTERM, signal.SIGHUP)
    former = {number: signal.signal(number, leave) for number in numbers}
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
