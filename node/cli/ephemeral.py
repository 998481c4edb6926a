"""A peer without weights that lives for one command: joins a swarm, submits, and leaves."""

import os
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from tempfile import TemporaryDirectory

from node.app import running_node
from node.cli.logs import configure_logging
from node.cli.options import read_config
from node.config import ENVIRONMENT_PREFIX
from node.engine.device import CPU


@asynccontextmanager
async def ephemeral_peer(bootstrap: Sequence[str]) -> AsyncIterator[str]:
    """Run a peer inside the block and yield its API's URL. It shares the user's model cache."""
    with TemporaryDirectory(prefix="metaswarm-", ignore_cleanup_errors=True) as data_dir:
        flags = [f"--data-dir={data_dir}", "--api=127.0.0.1:0", "--listen=/ip4/0.0.0.0/tcp/0", "--no-port-mapping"]
        flags.append(f"--log-level={os.environ.get(f'{ENVIRONMENT_PREFIX}LOG_LEVEL', 'warning')}")
        config = read_config(*flags, *(f"--bootstrap={each}" for each in bootstrap))
        configure_logging(config.log_level)
        async with running_node(replace(config, serve=(), api_key=None, api_keys=(), device=CPU)) as (_, ready):
            yield ready.api_url
