"""`metaswarm submit`: a client of the HTTP API that streams text."""

import json
import random
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from node.cli.output import CommandError, api_option, format_duration, json_option, model_option, print_json, printable

if TYPE_CHECKING:
    from node.api.interface import ModelDocument
    from node.cli.client import ApiClient, Completion

DEFAULT_MAX_TOKENS: Final = 256
CONCURRENCY: Final = 8
"""Concurrent jobs of a --file."""
RETRIED_CODES: Final = ("peers_full", "quality_being_measured")
"""Error codes that --file retries."""
RETRY_TIMEOUT_S: Final = 600.0
"""Longest time in which a job of a --file is retried."""
RETRY_JITTER: Final = (0.5, 1.5)
"""Factors of Retry-After, so that jobs refused together do not retry together."""
DISCOVERY_TIMEOUT_S: Final = 20.0
"""Longest time in which an ephemeral peer discovers the model."""
DISCOVERY_INTERVAL_S: Final = 0.25

_JOB_OPTIONS: Final = (
    "model", "chat", "max_tokens", "temperature", "top_p", "seed", "stop", "quality", "method", "ignore_eos",
    "objective", "budget", "min_tokens", "top_k", "min_p", "repetition_penalty", "frequency_penalty",
    "presence_penalty", "logit_bias", "stop_token_ids",
)  # fmt: skip
"""Options that a line of a --file may set for itself."""

_OPTIONAL_FIELDS: Final = _JOB_OPTIONS[_JOB_OPTIONS.index("min_tokens") :]
"""Of those, fields of the same name in the request, sent only if given."""


@click.command()
@click.argument("prompt", required=False)
@model_option
@api_option
@click.option(
    "--token-ids", is_flag=True, help="PROMPT is token ids such as 1 2 3, e.g. for a model without tokenizer."
)
@click.option("--chat", is_flag=True, help="Apply the model's chat template to the prompt.")
@click.option("--max-tokens", type=click.IntRange(1), default=DEFAULT_MAX_TOKENS, show_default=True, metavar="N")
@click.option(
    "--temperature",
    type=click.FloatRange(0, 2),
    default=0.0,
    metavar="T",
    help="Sampling temperature; 0, the default, is greedy.",
)
@click.option("--top-p", type=click.FloatRange(0, 1, min_open=True), default=1.0, show_default=True, metavar="P")
@click.option("--top-k", type=click.IntRange(0), metavar="K", help="Sample from the K most likely tokens; 0: from all.")
@click.option(
    "--min-p", type=click.FloatRange(0, 1), metavar="P", help="Minimum probability relative to the most likely token."
)
@click.option(
    "--repetition-penalty",
    type=click.FloatRange(0.01, 100),
    metavar="F",
    help="Factor on logits of tokens in prompt and text; 1 is off.",
)
@click.option(
    "--frequency-penalty", type=click.FloatRange(-2, 2), metavar="F", help="Penalty for each occurrence in the text."
)
@click.option("--presence-penalty", type=click.FloatRange(-2, 2), metavar="F", help="Penalty for tokens in the text.")
@click.option(
    "--logit-bias",
    multiple=True,
    callback=lambda _, __, values: _parse_biases(values),
    metavar="TOKEN=BIAS",
    help="Bias on the logit of a token id, -100 to 100; repeatable.",
)
@click.option("--seed", type=click.IntRange(-(2**63), 2**63 - 1), metavar="N", help="Seed of sampling.")
@click.option("--stop", multiple=True, metavar="TEXT", help="Stop text; up to four.")
@click.option(
    "--stop-token-id",
    "stop_token_ids",
    type=click.IntRange(0),
    multiple=True,
    metavar="ID",
    help="Stop token; repeatable.",
)
@click.option("--min-tokens", type=click.IntRange(0), metavar="N", help="Minimum number of tokens before any stop.")
@click.option("--quality", type=click.Choice(["exact", "near", "any"]), default="exact", show_default=True)
@click.option(
    "--objective",
    type=click.Choice(["latency", "throughput", "cost"]),
    default="latency",
    show_default=True,
    help="Prefer the fastest job, the least computing, or the lowest cost.",
)
@click.option(
    "--budget",
    type=click.FloatRange(0, min_open=True),
    metavar="COST",
    help="Highest predicted cost: seconds of computing on each peer times its --price.",
)
@click.option(
    "--method",
    default="auto",
    show_default=True,
    metavar="NAME",
    help="auto, or switches such as prefix_cache=on|speculation=ngram-8.",
)
@click.option("--ignore-eos", is_flag=True, help="Continue past the end-of-text token, for measurements.")
@click.option(
    "--file",
    "prompts_file",
    type=click.Path(exists=True, dir_okay=False, allow_dash=True, path_type=Path),
    metavar="PROMPTS.jsonl",
    help='JSON lines {"prompt": …, OPTION: …} to submit; prints one document a line, and retries while peers are full.',
)
@click.option(
    "--bootstrap",
    multiple=True,
    metavar="FILE_OR_MULTIADDR",
    help="If no node runs here, join the swarm there for this job. Honours METASWARM_SWARM_KEY.",
)
@json_option
def submit(
    prompt: str | None,
    prompts_file: Path | None,
    api: str | None,
    bootstrap: tuple[str, ...],
    as_json: bool,
    token_ids: bool,
    **options: Any,
) -> None:
    """Submit PROMPT (`-` reads stdin) and stream the text, or token ids for a model without tokenizer.

    With --json one document is printed at the end. Ctrl-C cancels the job on every stage.
    """
    if (prompt is None) == (prompts_file is None):
        raise click.UsageError("give either a PROMPT or a --file")
    if token_ids and (prompts_file is not None or options["chat"]):
        raise click.UsageError("--token-ids requires a PROMPT; lines of a --file may have lists of token ids")
    if prompts_file is not None:
        jobs = read_jobs(prompts_file, options)
    else:
        assert prompt is not None
        text = _read_text("-") if prompt == "-" else prompt
        jobs = [options | {"prompt": _parse_token_ids(text) if token_ids else text}]

    import trio

    run = partial(_run_one, as_json=as_json) if prompts_file is None else _run_many
    trio.run(_submit, run, jobs, api, bootstrap)


def _parse_token_ids(text: str) -> list[int]:
    pieces = text.replace(",", " ").strip("[] \n").split()
    if not pieces or not all(piece.isdecimal() and len(piece) < 10 for piece in pieces):
        raise click.UsageError(f"--token-ids: expected a list such as 1 2 3, not {text[:40]!r}")
    return [int(piece) for piece in pieces]


def _read_text(name: str) -> str:
    try:
        return (sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()).decode()
    except OSError as error:
        raise CommandError(f"cannot read {name}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise CommandError(f"{'the input' if name == '-' else name} is not UTF-8 text: {error}") from None


def _parse_biases(texts: Sequence[str]) -> dict[str, float]:
    biases: dict[str, float] = {}
    for text in texts:
        token, _, bias = text.partition("=")
        try:
            biases[str(int(token))] = float(bias)
        except ValueError:
            raise click.BadParameter(f"{text!r} is not TOKEN=BIAS, for example 1234=-100") from None
    return biases


def read_jobs(path: Path, options: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the jobs of a file, each line's own settings over `options`. Raises UsageError that names the line."""
    text = _read_text(str(path))
    jobs = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            job = json.loads(line)
        except ValueError as error:
            raise click.UsageError(f"{path}, line {number}: not valid JSON: {error}") from None
        prompt = job.get("prompt") if isinstance(job, dict) else None
        is_token_ids = isinstance(prompt, list) and all(type(token) is int for token in prompt)
        if not is_token_ids and not isinstance(prompt, str):
            raise click.UsageError(f'{path}, line {number}: expected an object with a "prompt", text or token ids')
        unknown = job.keys() - {"prompt", *_JOB_OPTIONS}
        if unknown:
            raise click.UsageError(
                f"{path}, line {number}: unknown option {min(unknown)!r}; the options are {', '.join(_JOB_OPTIONS)}"
            )
        jobs.append({**options, **job})
    if not jobs:
        raise click.UsageError(f"{path} contains no prompts")
    return jobs


def make_body(job: Mapping[str, Any], default_model: str) -> dict[str, Any]:
    """Return the body of a request for one job."""
    prompt = job["prompt"]
    is_text = isinstance(prompt, str)
    if is_text and not prompt.isascii() and any("\ud800" <= character <= "\udfff" for character in prompt):
        raise click.UsageError("the prompt is not valid Unicode text")  # the shell passed bytes that are not UTF-8
    body = {name: job[name] for name in ("max_tokens", "temperature", "top_p", "seed")}
    body["model"] = job["model"] or default_model
    body["stop"] = list(job["stop"]) if isinstance(job["stop"], tuple) else job["stop"]
    body |= {name: job[name] for name in _OPTIONAL_FIELDS if job.get(name) not in (None, (), {})}
    body["metaswarm"] = {name: job[name] for name in ("quality", "method", "objective", "ignore_eos")}
    if job["budget"] is not None:
        body["metaswarm"]["budget"] = job["budget"]
    if job["chat"] and not is_text:
        raise click.UsageError("chat requires a text prompt, not token ids")
    if job["chat"]:
        return body | {"messages": [{"role": "user", "content": prompt}]}
    return body | {"prompt": prompt}


async def _submit(
    run: Callable[["ApiClient", Sequence[Mapping[str, Any]], str], Awaitable[None]],
    jobs: Sequence[Mapping[str, Any]],
    api: str | None,
    bootstrap: Sequence[str],
) -> None:
    from node.cli.client import open_client

    async with _find_node(api, bootstrap) as (url, is_new), open_client(url) as client:
        default_model = ""
        for wanted in {job["model"] for job in jobs}:
            if wanted is None:
                default_model = await choose_model(client, None, DISCOVERY_TIMEOUT_S if is_new else 0.0)
            elif is_new:
                await choose_model(client, wanted, DISCOVERY_TIMEOUT_S)
        await run(client, jobs, default_model)


@asynccontextmanager
async def _find_node(api: str | None, bootstrap: Sequence[str]) -> AsyncIterator[tuple[str, bool]]:
    """Yield the URL of the node to submit to, and whether it was started for that."""
    from node.cli.client import find_api, open_client

    url = find_api(api)
    is_there = True
    if bootstrap and api is None:
        async with open_client(url) as client:
            is_there = await client.is_there()
    if is_there:
        yield url, False
        return

    from node.cli.ephemeral import ephemeral_peer

    async with ephemeral_peer(bootstrap) as own_url:
        yield own_url, True


async def choose_model(client: "ApiClient", wanted: str | None, timeout_s: float = 0.0) -> str:
    """Return the model to use; wait until a peer that has just joined discovers it."""
    import trio

    deadline_s = trio.current_time() + timeout_s
    while True:
        models = await client.models()
        complete = [model["name"] or model["model"] for model in models if model["complete"]]
        if wanted is None and len(complete) == 1:
            return complete[0]
        usable = [model for model in models if _is_usable(model)]
        if wanted is not None and any(
            model["name"] == wanted or (len(wanted) >= 8 and model["model"].startswith(wanted)) for model in usable
        ):
            return wanted
        if trio.current_time() >= deadline_s:
            break
        await trio.sleep(DISCOVERY_INTERVAL_S)
    if wanted is not None:
        return wanted  # the node reports what is wrong with it
    if complete:
        raise CommandError(f"several models are complete; choose one with --model: {', '.join(complete)}")
    if usable:
        unnamed = ", ".join(model["model"][:12] for model in usable)
        raise CommandError(f"models of unknown origin only; choose one that you trust with --model: {unnamed}")
    partly = "; incomplete: " + ", ".join(model["name"] or model["model"] for model in models) if models else ""
    raise CommandError(f"no model is complete in this swarm: serve one with `metaswarm node --serve MODEL`{partly}")


def _is_usable(model: "ModelDocument") -> bool:
    """Return whether a model seems complete: its manifest is fetched only once the user names it."""
    return model["complete"] or (not model["local"] and bool(model["block_count"]) and not model["uncovered"])


async def _run_one(
    client: "ApiClient", jobs: Sequence[Mapping[str, Any]], default_model: str, *, as_json: bool
) -> None:
    (job,) = jobs
    is_terminal = sys.stdout.isatty()
    line_is_open = False

    def show(text: str) -> None:
        nonlocal line_is_open
        line_is_open = True
        click.echo(printable(text) if is_terminal else text, nl=False)

    body = make_body(job, default_model)
    if as_json:
        print_json((await client.complete(body)).document())
        return
    try:
        document = (await client.complete(body, show)).document()
        if document["token_ids"] and not document["text"] and isinstance(job["prompt"], list):
            show(" ".join(map(str, document["token_ids"])))
    finally:
        if line_is_open:
            click.echo()
    if sys.stderr.isatty():
        tokens, peers = document["usage"]["completion_tokens"], len({stage["peer"] for stage in document["route"]})
        ttft, tpot, total = (format_duration(document["timing"][name]) for name in ("ttft_s", "tpot_s", "total_s"))
        summary = f"{tokens} tokens over {peers} peers: the first after {ttft}, then one every {tpot}, {total} in all"
        cost = document["cost"]
        if cost is not None and (cost["budget"] is not None or cost["objective"] == "cost"):
            predicted = "" if cost["predicted"] is None else f", predicted {cost['predicted']:.3g}"
            within = "" if cost["budget"] is None else f", budget {cost['budget']:.3g}"
            summary += f"; cost {cost['actual']:.3g}{predicted}{within}"
        click.secho(summary, dim=True, err=True)


async def _run_many(client: "ApiClient", jobs: Sequence[Mapping[str, Any]], default_model: str) -> None:
    """Run the jobs concurrently and print their documents in order. Raises CommandError if any failed."""
    import trio

    from node.cli.client import RefusedError

    documents: dict[int, dict[str, Any]] = {}
    printed = failed = 0
    limiter = trio.CapacityLimiter(CONCURRENCY)

    async def run(index: int, job: Mapping[str, Any]) -> None:
        nonlocal printed, failed
        async with limiter:
            try:
                completion = await _complete_with_retry(client, make_body(job, default_model))
                documents[index] = completion.document()
            except RefusedError as error:
                failed += 1
                documents[index] = {"error": {"message": error.message, "code": error.code}}
        while printed in documents:
            print_json(documents.pop(printed))
            printed += 1

    async with trio.open_nursery() as nursery:
        for index, job in enumerate(jobs):
            nursery.start_soon(run, index, job)
    if failed:
        raise CommandError(f"{failed} of {len(jobs)} jobs failed: see their lines")


async def _complete_with_retry(client: "ApiClient", body: dict[str, Any]) -> "Completion":
    """Submit a job, with retries while peers are full or its method is being measured. Raises RefusedError."""
    import trio

    from node.cli.client import RefusedError

    deadline_s = trio.current_time() + RETRY_TIMEOUT_S
    while True:
        try:
            return await client.complete(body)
        except RefusedError as error:
            if error.code not in RETRIED_CODES or error.retry_after_s is None or trio.current_time() > deadline_s:
                raise
            pause_s = error.retry_after_s * random.uniform(*RETRY_JITTER)
        await trio.sleep(pause_s)
