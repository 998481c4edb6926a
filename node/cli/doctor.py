"""`metaswarm doctor`: why a node cannot join, cannot be reached, or a model is incomplete."""

from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import click

from node.cli.options import NODE_OPTIONS, SETTINGS, make_config, refuse_unknown_variables
from node.cli.output import json_option, out, print_json, printable

if TYPE_CHECKING:
    from node.config import NodeConfig
    from node.doctor.report import Diagnosis, RunningNode


@click.command(params=[*NODE_OPTIONS], context_settings=SETTINGS)
@json_option
def doctor(as_json: bool, **options: Any) -> int:
    """Diagnose in one line why a node cannot start, join, be reached or serve, or why a model is incomplete.

    Takes the options of `metaswarm node` and examines that configuration, whether or not the node runs. Changes
    nothing: joins the swarm for some seconds under an identity of its own, and hashes the model files to serve.
    Exit code 0: healthy; 1: not.
    """
    refuse_unknown_variables()
    config = make_config(options)

    import trio

    from node.cli.logs import configure_logging

    configure_logging("error")
    diagnosis = trio.run(_examine, config)
    if as_json:
        print_json({"healthy": diagnosis.healthy, **asdict(diagnosis)})
    else:
        out().print(printable(render(diagnosis)))
    return 0 if diagnosis.healthy else 1


async def _examine(config: "NodeConfig") -> "Diagnosis":
    from node.doctor.diagnose import diagnose

    running = await _running_node(config)
    if running is not None and not config.bootstrap:
        config = replace(config, bootstrap=tuple(each["multiaddr"] for each in running.status["bootstrap"]))
    return await diagnose(config, running)


async def _running_node(config: "NodeConfig") -> "RunningNode | None":
    """Return the status of the node in the data directory; None where none answers."""
    from node.cli.client import open_client
    from node.cli.output import CommandError
    from node.config import NodeReady
    from node.doctor.report import RunningNode

    ready = NodeReady.read(config.data_dir)
    if ready is None:
        return None
    try:
        async with open_client(ready.api_url) as client:
            status = await client.status()
            if status["peer_id"] != ready.peer_id:
                return None  # another node has taken its port
            return RunningNode(status, await client.models())
    except CommandError:
        return None


def render(diagnosis: "Diagnosis") -> str:
    """Return one line for each finding, the gravest first, and one for the build of llama.cpp."""
    lines = [str(finding) for finding in diagnosis.findings]
    if diagnosis.llamacpp is not None:
        lines.append(f"llama.cpp: {diagnosis.llamacpp}")
    if diagnosis.healthy:
        peers = len(diagnosis.peers)
        models = ", ".join(diagnosis.complete_models) or "none"
        state = "a node runs here" if diagnosis.running else "a node could start here"
        lines.insert(
            0,
            f"all is well: {state}; {peers} other {'peer' if peers == 1 else 'peers'} seen; models complete: {models}",
        )
    return "\n".join(lines)
