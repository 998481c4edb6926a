"""`metaswarm submit`: a client of the HTTP API that streams text."""

import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from node.cli.job_options import job_options, make_body, read_text
from node.cli.output import (
    api_option,
    bootstrap_option,
    err,
    format_duration,
    json_option,
    model_option,
    print_json,
    printable,
)
from node.cli.target import node_for_command, on_node

if TYPE_CHECKING:
    from node.cli.client import ApiClient, Completion

DEFAULT_MAX_TOKENS: Final = 256
CONCURRENCY: Final = 8
"""Concurrent jobs of a --file."""

_Run = Callable[["ApiClient", Sequence[Mapping[str, Any]], str], Awaitable[None]]


@click.command()
@click.argument("prompt", required=False)
@model_option
@api_option
@bootstrap_option
@click.option(
    "--token-ids", is_flag=True, help="PROMPT is token ids such as 1 2 3, e.g. for a model without tokenizer."
)
@click.option("--chat", is_flag=True, help="Apply the model's chat template to the prompt.")
@job_options(temperature=0.0, max_tokens=DEFAULT_MAX_TOKENS)
@click.option(
    "--trace", is_flag=True, help="Show where the time of the tokens went on each stage; --json has every token."
)
@click.option(
    "--file",
    "prompts_file",
    type=click.Path(exists=True, dir_okay=False, allow_dash=True, path_type=Path),
    metavar="PROMPTS.jsonl",
    help='JSON lines to submit, {"prompt": …, OPTION: …} or as OpenAI batches have; prints one document a line.',
)
@click.option(
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Append the answers of --file to FILE; a rerun resumes: finished prompts are skipped.",
)
@click.option(
    "--concurrency",
    type=click.IntRange(1, 64),
    default=CONCURRENCY,
    show_default=True,
    metavar="N",
    help="Concurrent jobs of a --file.",
)
@json_option
def submit(
    prompt: str | None,
    prompts_file: Path | None,
    output: Path | None,
    concurrency: int,
    api: str | None,
    bootstrap: tuple[str, ...],
    as_json: bool,
    token_ids: bool,
    trace: bool,
    **options: Any,
) -> None:
    """Submit PROMPT (`-` reads stdin) and stream the text, or token ids for a model without tokenizer.

    With --json one document is printed at the end. Ctrl-C cancels the job on every stage.
    """
    if (prompt is None) == (prompts_file is None):
        raise click.UsageError("give either a PROMPT or a --file")
    if prompts_file is None and output is not None:
        raise click.UsageError("--output belongs to --file; redirect the text of one PROMPT with >")
    if prompts_file is not None and (token_ids or trace):
        name = "--token-ids" if token_ids else "--trace"
        raise click.UsageError(f"{name} requires a PROMPT; lines of a --file may have lists of token ids")
    if token_ids and options["chat"]:
        raise click.UsageError("--chat requires text, not --token-ids")

    from node.cli.submit_file import read_jobs, run_file

    if prompts_file is not None:
        jobs = read_jobs(prompts_file, options)
        run: _Run = partial(run_file, output=output, concurrency=concurrency)
    else:
        assert prompt is not None
        text = read_text("-") if prompt == "-" else prompt
        jobs = [options | {"prompt": _parse_token_ids(text) if token_ids else text}]
        run = partial(_run_one, trace=trace, as_json=as_json)
    with node_for_command(api, bootstrap) as (url, is_new):
        on_node(url, partial(_submit, run, jobs, is_new))


def _parse_token_ids(text: str) -> list[int]:
    pieces = text.replace(",", " ").strip("[] \n").split()
    if not pieces or not all(piece.isdecimal() and len(piece) < 10 for piece in pieces):
        raise click.UsageError(f"--token-ids: expected a list such as 1 2 3, not {text[:40]!r}")
    return [int(piece) for piece in pieces]


async def _submit(run: _Run, jobs: Sequence[Mapping[str, Any]], is_new: bool, client: "ApiClient") -> None:
    from node.cli.target import DISCOVERY_TIMEOUT_S, choose_model

    default_model = ""
    for wanted in {job["model"] for job in jobs}:
        if wanted is None:
            default_model = await choose_model(client, None, DISCOVERY_TIMEOUT_S if is_new else 0.0)
        elif is_new:
            await choose_model(client, wanted, DISCOVERY_TIMEOUT_S)
    await run(client, jobs, default_model)


async def _run_one(
    client: "ApiClient", jobs: Sequence[Mapping[str, Any]], default_model: str, *, trace: bool, as_json: bool
) -> None:
    (job,) = jobs
    body = make_body(job, default_model)
    if trace:
        body["metaswarm"]["trace"] = True
    if as_json:
        print_json((await client.complete(body)).document())
        return
    completion = await stream_text(client, body)
    document = completion.document()
    if document["token_ids"] and not document["text"] and isinstance(job["prompt"], list):
        click.echo(" ".join(map(str, document["token_ids"])))
    if trace:
        from node.cli.trace import render_trace

        err().print(render_trace(document))
    elif sys.stderr.isatty():
        click.secho(summary(completion), dim=True, err=True)


async def stream_text(
    client: "ApiClient", body: dict[str, Any], completion: "Completion | None" = None
) -> "Completion":
    """Run a job and print its text as it comes, reasoning dimmed; whatever happens, the line is ended.

    `completion`: what the answer is added to.
    """
    is_terminal = sys.stdout.isatty()
    ends_line = True
    reasons = False

    def show(text: str, *, reasoning: bool = False) -> None:
        nonlocal ends_line, reasons
        if not text:
            return
        if reasons and not reasoning:
            click.echo("\n")
        reasons = reasoning
        ends_line = text.endswith("\n")
        text = printable(text) if is_terminal else text
        click.secho(text, dim=True, nl=False) if reasoning else click.echo(text, nl=False)

    try:
        # Without a terminal the text is for a program, which did not ask for the reasoning.
        return await client.complete(body, show, partial(show, reasoning=True) if is_terminal else None, completion)
    finally:
        if not ends_line:
            click.echo()


def summary(completion: "Completion") -> str:
    """Return in one line how fast an answer came."""
    document = completion.document()
    timing, tokens = document["timing"], document["usage"]["completion_tokens"]
    peers = len({stage["peer"] for stage in document["route"]})
    rate = f"{1 / timing['tpot_s']:.1f} tokens/s" if timing["tpot_s"] > 0 else f"{format_duration(timing['total_s'])}"
    return (
        f"{tokens} token{'' if tokens == 1 else 's'}, {rate}, the first after {format_duration(timing['ttft_s'])}, "
        f"over {peers} peer{'' if peers == 1 else 's'}{_cost_summary(document['cost'])}"
    )


def _cost_summary(cost: Mapping[str, Any] | None) -> str:
    """Return what a job cost, where that was asked for."""
    if cost is None or (cost["budget"] is None and cost["objective"] != "cost"):
        return ""
    predicted = "" if cost["predicted"] is None else f", predicted up to {cost['predicted']:.3g}"
    within = "" if cost["budget"] is None else f", budget {cost['budget']:.3g}"
    actual = "unknown" if cost["actual"] is None else f"{cost['actual']:.3g}"
    return f"; cost {actual}{predicted}{within}"
