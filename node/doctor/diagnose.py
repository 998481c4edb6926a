"""Runs all checks on a node's configuration.

The doctor looks at what the node would use (directory, ports, files, memory), probes the ports of bootstrap peers, and
joins the swarm for some seconds as a peer of its own that serves nothing, to receive heartbeats. It changes nothing and
works beside a running node.
"""

import time
from collections.abc import Callable

import trio

from node.config import NodeConfig
from node.doctor.local_checks import check_data_dir, check_devices, check_files, check_llamacpp, check_ports
from node.doctor.report import Diagnosis, RunningNode
from node.doctor.swarm_checks import SwarmChecks


async def diagnose(
    config: NodeConfig, running: RunningNode | None = None, *, wall_clock: Callable[[], float] = time.time
) -> Diagnosis:
    """Return what is wrong. `running`: the node that answers at the data directory's API, if one does."""
    diagnosis = Diagnosis(running=running is not None)
    diagnosis.add(check_data_dir(config, running))
    devices, findings = await check_devices(config)
    diagnosis.add(findings)
    diagnosis.llamacpp, findings = await check_llamacpp(config)
    diagnosis.add(findings)
    diagnosis.add(await trio.to_thread.run_sync(check_files, config, devices, running))
    if running is None:
        diagnosis.add(await check_ports(config))
    swarm = SwarmChecks(config, running, wall_clock)
    diagnosis.add(await swarm.run())
    diagnosis.peers, diagnosis.complete_models = swarm.peers, swarm.complete_models
    return diagnosis
