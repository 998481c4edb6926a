"""`metaswarm demo`: runs a job on a swarm of local daemons, which `node.demo` starts."""

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from node.cli.output import (
    CommandError,
    ProgressCallback,
    format_duration,
    json_option,
    new_table,
    out,
    print_json,
    printable,
    progress_bars,
)

if TYPE_CHECKING:
    from node.cli.client import ApiClient, Completion
    from node.demo import LocalPeer

DEFAULT_PROMPT: Final = "What is the capital of France, and what is it known for?"
COMPLETE_TIMEOUT_S: Final = 60.0
"""Longest wait for complete coverage once the peers are ready."""
POLL_INTERVAL_S: Final = 0.1
BUILD_TIMEOUT_S: Final = 30.0
"""Longest wait for faster variants, which peers build in the background."""
REPETITIONS: Final = 2
REPETITION_TOKENS: Final = 12
"""Repetitions by the baseline and by the method, and their tokens."""


@click.command()
@click.option("--nodes", type=click.IntRange(1), default=3, show_default=True, metavar="N", help="Number of peers.")
@click.option("--prompt", default=DEFAULT_PROMPT, show_default=True, metavar="P", help="Prompt, a chat message.")
@click.option("--max-tokens", type=click.IntRange(1), default=128, show_default=True, metavar="N")
@click.option("--keep", is_flag=True, help="Keep the peers running until Ctrl-C.")
@json_option
def demo(nodes: int, prompt: str, max_tokens: int, keep: bool, as_json: bool) -> None:
    """Run a small swarm on this machine and ask it a question.

    Imports the demo model if needed, starts N peers with an equal share of its blocks, submits the prompt to one of
    them, streams the text, and prints route, timing, the method voted for, and its predicted and measured speed-up.
    """
    import trio

    from node.demo import DaemonDiedError
    from node.models.catalogue import DEMO_MODEL
    from node.models.importer import import_model
    from node.models.store import ModelStore

    store = ModelStore()
    with progress_bars() as progress:
        package = import_model(DEMO_MODEL, store, progress=progress)
    swarm = (DEMO_MODEL, package.manifest.block_count, nodes, store.cache_dir)
    try:
        trio.run(partial(_run, swarm, prompt=prompt, max_tokens=max_tokens, keep=keep, as_json=as_json))
    except DaemonDiedError as error:
        for line in error.log_lines:
            click.echo(printable(line), err=True)
        raise CommandError(str(error)) from None


async def _run(swarm: tuple[str, int, int, Path], *, prompt: str, max_tokens: int, keep: bool, as_json: bool) -> None:
    import trio

    from node.cli.client import open_client
    from node.demo import local_swarm

    model, block_count = swarm[:2]
    began_s = trio.current_time()
    with ExitStack() as bars:
        progress = bars.enter_context(progress_bars())
        async with local_swarm(*swarm, progress) as peers, open_client(peers[0].ready.api_url) as client:
            await _wait_until_complete(client, model, block_count, progress)
            await _wait_until_fast(client, model, progress)
            bars.close()
            start_s = trio.current_time() - began_s
            message = {"role": "user", "content": prompt}
            body = {"model": model, "messages": [message], "temperature": 0, "max_tokens": max_tokens}
            if not as_json:
                click.secho(f"> {prompt}", bold=True)
            completion = await (client.complete(body) if as_json else client.complete(body, _show_text))
            speedup = await _measure_speedup(client, body, completion)
            report = make_report(completion, peers, start_s) | {"speedup": speedup}
            if as_json:
                print_json(report)
            else:
                _print_report(report)
            if keep:
                _print_commands(peers)
                await trio.sleep_forever()


async def _wait_until_complete(client: "ApiClient", model: str, block_count: int, progress: ProgressCallback) -> None:
    import trio

    progress("find every block", 0, block_count)
    with trio.move_on_after(COMPLETE_TIMEOUT_S):
        while True:
            for each in await client.models():
                if each["name"] == model:
                    progress("find every block", sum(count > 0 for count in each["coverage"]), block_count)
                    if each["complete"]:
                        return
            await trio.sleep(POLL_INTERVAL_S)
    raise CommandError(f"the peers did not discover all blocks within {COMPLETE_TIMEOUT_S:.0f} seconds: see their logs")


async def _wait_until_fast(client: "ApiClient", model: str, progress: ProgressCallback) -> None:
    """Wait a bounded time until the swarm would choose another method than the baseline."""
    import trio

    from selector.task import baseline_of, portfolio

    progress("build faster variants", 0, 1)
    with trio.move_on_after(BUILD_TIMEOUT_S):
        while True:
            agreed = (await client.explain({"model": model}))["agreed"]
            baseline = baseline_of(agreed)
            # Variants of other engines that compute exactly are being built unasked.
            faster = any(each.exact and each.engine != baseline.engine for each in portfolio(baseline.package_format))
            if agreed != baseline.name or not faster:
                break
            await trio.sleep(1.0)
    progress("build faster variants", 1, 1)


async def _measure_speedup(
    client: "ApiClient", body: dict[str, Any], completion: "Completion"
) -> dict[str, float | None]:
    """Run a shorter job by the baseline and by the chosen method in turn; compare them."""
    import math

    from selector.task import baseline_of

    selection = completion.metaswarm["selection"]
    chosen = completion.metaswarm["method"]["name"]
    predicted = selection["predicted_speedup"] if selection else None
    plain = baseline_of(chosen).name
    if chosen == plain:
        return {"predicted": predicted, "actual": 1.0}
    short = body | {"max_tokens": min(REPETITION_TOKENS, body["max_tokens"])}
    took_s: dict[str, list[float]] = {plain: [], chosen: []}
    for number in range(REPETITIONS):
        # Another prompt each time, as the first one may be in the prefix cache.
        content = f"({number + 1}) {body['messages'][0]['content']}"
        asked = short | {"messages": [{"role": "user", "content": content}]}
        for name, of in took_s.items():
            again = await client.complete(asked | {"metaswarm": {"method": name, "ignore_eos": True}})
            of.append(again.metaswarm["timing"]["total_s"])
    ratios = [slow / fast for slow, fast in zip(took_s[plain], took_s[chosen], strict=True)]
    return {"predicted": predicted, "actual": math.exp(sum(map(math.log, ratios)) / len(ratios))}


def _show_text(text: str) -> None:
    click.echo(printable(text), nl=False)


def make_report(completion: "Completion", peers: Sequence["LocalPeer"], start_s: float) -> dict[str, Any]:
    """Return the document of `metaswarm demo --json`: that of the job, and its stages."""
    at = {peer.ready.peer_id: peer.ready for peer in peers}
    stages = []
    for stage in completion.metaswarm["route"]:
        ready = at[stage["peer"]]
        place = {"multiaddr": next(iter(ready.multiaddrs), ""), "api_url": ready.api_url, "pid": ready.pid}
        stages.append({name: stage[name] for name in ("peer", "start", "end", "compute_s")} | place)
    return completion.document() | {"stages": stages, "start_s": start_s}


def _duration(seconds: float | None) -> str:
    return "-" if seconds is None else format_duration(seconds)


def _print_report(report: dict[str, Any]) -> None:
    from selector.task import baseline_of

    timing, usage, method = report["timing"], report["usage"], report["method"]
    table = new_table("stage", "peer", "blocks", "address", ">compute")
    for number, stage in enumerate(report["stages"], 1):
        host_and_port = ":".join(stage["multiaddr"].split("/")[2:5:2])
        blocks = f"{stage['start']}-{stage['end']}"
        table.add_row(str(number), stage["peer"], blocks, host_and_port, _duration(stage["compute_s"]))
    click.echo("\n")
    out().print(table)
    votes = len(report["consensus"]["votes"])
    rate = f"{1 / timing['tpot_s']:.1f}" if timing["tpot_s"] > 0 else "-"
    facts = {
        "method": method["name"] + (f", the choice of {votes} vote{'' if votes == 1 else 's'}" if votes else ""),
        "tokens": f"{usage['prompt_tokens']} in, {usage['completion_tokens']} out, {rate} tokens/s",
        "timing": f"first token after {format_duration(timing['ttft_s'])}, then one every "
        f"{format_duration(timing['tpot_s'])}, {format_duration(timing['total_s'])} in all",
        "start-up": f"{format_duration(report['start_s'])} until every block was served",
    }
    speedup = report["speedup"]
    if method["name"] == baseline_of(method["name"]).name:
        reason = "as the swarm has measured too little so far; see `metaswarm explain` (while it runs: --keep)"
        facts["speed-up"] = f"none: this is the baseline, {reason}"
    elif speedup["predicted"] is not None:
        predicted = f"{speedup['predicted']:.2f}x predicted over the baseline"
        facts["speed-up"] = f"{predicted}, {speedup['actual']:.2f}x measured"
    for name, value in facts.items():
        click.echo(f"{name:<9} {printable(value)}")


def _print_commands(peers: Sequence["LocalPeer"]) -> None:
    ready = peers[0].ready
    lines = [
        "",
        "The peers run until Ctrl-C. Use them from another terminal:",
        f"  metaswarm chat --api {ready.api_url}",
        f"  metaswarm status --watch --api {ready.api_url}",
        f"  metaswarm explain --api {ready.api_url}",
        f"  metaswarm node --listen /ip4/127.0.0.1/tcp/0 --bootstrap {ready.multiaddrs[0]}",
        f"or with any client of the OpenAI API at {ready.api_url}/v1",
    ]
    click.echo("\n".join(lines), err=True)
