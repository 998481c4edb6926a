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

from node.cli.output import CommandError, api_option, format_duration, json_option, print_json, printable

if TYPE_CHECKING:
    from node.api.interface import ModelDocument
    from node.cli.client import ApiClient, Completion

DEFAULT_MAX_TOKENS: Final = 256
CONCURRENCY: Final = 8
"""Prompts of a --file that are under way at a time."""
WORTH_WAITING: Final = ("peers_full", "quality_being_measured")
"""The code of the error that is worth waiting for."""
FULL_TIMEOUT_S: Final = 600.0
"""How long a prompt of a --file waits for peers that have no room, before its line says so."""
FULL_SPREAD: Final = (0.5, 1.5)
"""Of the pause that the node asks for: those who were refused together do not come back together."""
DISCOVERY_TIMEOUT_S: Final = 20.0
"""How long an ephemeral peer may take to hear of the model."""
DISCOVERY_INTERVAL_S: Final = 0.25

_JOB_OPTIONS: Final = (
    "model", "chat", "max_tokens", "temperature", "top_p", "seed", "stop", "quality", "method", "ignore_eos",
    "min_tokens", "top_k", "min_p", "repetition_penalty", "frequency_penalty", "presence_penalty", "logit_bias",
    "stop_token_ids",
)  # fmt: skip
"""Options that a line of a --file may set for itself."""

_OPTIONAL_FIELDS: Final = _JOB_OPTIONS[_JOB_OPTIONS.index("min_tokens") :]
"""Of those, the ones that a request has only where they are given, under the same name."""


@click.command()
@click.argument("prompt", required=False)
@click.option("--model", metavar="M", help="Name or id (8 digits or more); needless where one model is complete.")
@api_option
@click.option("--token-ids", is_flag=True, help="PROMPT is token ids, as 1 2 3: the way for a model without tokenizer.")
@click.option("--chat", is_flag=True, help="The prompt is a user's turn in a chat: use the model's chat template.")
@click.option("--max-tokens", type=click.IntRange(1), default=DEFAULT_MAX_TOKENS, show_default=True, metavar="N")
@click.option("--temperature", type=click.FloatRange(0, 2), default=0.0, metavar="T", help="0, the default, is greedy.")
@click.option("--top-p", type=click.FloatRange(0, 1, min_open=True), default=1.0, show_default=True, metavar="P")
@click.option("--top-k", type=click.IntRange(0), metavar="K", help="Draw from the K likeliest tokens; 0: from all.")
@click.option(
    "--min-p", type=click.FloatRange(0, 1), metavar="P", help="Only tokens P times as likely as the likeliest."
)
@click.option(
    "--repetition-penalty",
    type=click.FloatRange(0.01, 100),
    metavar="F",
    help="Divide the logits of tokens of prompt and text by F; 1 changes nothing.",
)
@click.option(
    "--frequency-penalty", type=click.FloatRange(-2, 2), metavar="F", help="Off a logit for each time in the text."
)
@click.option(
    "--presence-penalty", type=click.FloatRange(-2, 2), metavar="F", help="Off the logits of tokens in the text."
)
@click.option(
    "--logit-bias",
    multiple=True,
    callback=lambda _, __, values: _parse_biases(values),
    metavar="TOKEN=BIAS",
    help="Add BIAS, -100 to 100, to the logit of a token id; up to 300.",
)
@click.option(
    "--seed", type=click.IntRange(-(2**63), 2**63 - 1), metavar="N", help="The same seed draws the same text."
)
@click.option("--stop", multiple=True, metavar="TEXT", help="End before this text; up to four.")
@click.option(
    "--stop-token-id", "stop_token_ids", type=click.IntRange(0), multiple=True, metavar="ID", help="End there."
)
@click.option("--min-tokens", type=click.IntRange(0), metavar="N", help="Neither end-of-text nor stop before N tokens.")
@click.option("--quality", type=click.Choice(["exact", "near", "any"]), default="exact", show_default=True)
@click.option(
    "--method",
    default="auto",
    show_default=True,
    metavar="NAME",
    help="auto, or switches: engine=fused|prefix_cache=on.",
)
@click.option("--ignore-eos", is_flag=True, help="Go on past the model's end-of-text token, for measurements.")
@click.option(
    "--file",
    "prompts_file",
    type=click.Path(exists=True, dir_okay=False, allow_dash=True, path_type=Path),
    metavar="PROMPTS.jsonl",
    help='Many prompts, one {"prompt": …} a line, which may set any option of a job; prints one document a line, and '
    "waits while the peers are full.",
)
@click.option(
    "--bootstrap",
    multiple=True,
    metavar="FILE_OR_MULTIADDR",
    help="Where no node runs on this machine: join the swarm there for this one job. METASWARM_SWARM_KEY is heeded.",
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
    """Submit PROMPT (`-` reads it from stdin) and stream the text, or what a model without tokenizer gives: token ids.

    With --json one document is printed at the end instead. Ctrl-C cancels the job everywhere.
    """
    if (prompt is None) == (prompts_file is None):
        raise click.UsageError("give either a PROMPT or a --file")
    if token_ids and (prompts_file is not None or options["chat"]):
        raise click.UsageError("--token-ids goes with a PROMPT only: a line of a --file may have a list of them")
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
        raise click.UsageError(f"--token-ids: {text[:40]!r} is not a list of token ids, such as 1 2 3")
    return [int(piece) for piece in pieces]


def _is_prompt(value: object) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(type(token) is int for token in value))


def _read_text(name: str) -> str:
    try:
        return (sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()).decode()
    except OSError as error:
        raise CommandError(f"cannot read {name}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise CommandError(f"{'the input' if name == '-' else name} is no UTF-8 text: {error}") from None


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
            raise click.UsageError(f"{path}, line {number}: no valid JSON: {error}") from None
        if not isinstance(job, dict) or not _is_prompt(job.get("prompt")):
            raise click.UsageError(f'{path}, line {number}: expected an object with a "prompt", text or token ids')
        unknown = job.keys() - {"prompt", *_JOB_OPTIONS}
        if unknown:
            raise click.UsageError(
                f"{path}, line {number}: there is no option {min(unknown)!r}; there are {', '.join(_JOB_OPTIONS)}"
            )
        jobs.append({**options, **job})
    if not jobs:
        raise click.UsageError(f"{path} holds no prompts")
    return jobs


def make_body(job: Mapping[str, Any], default_model: str) -> dict[str, Any]:
    """Return the body of a request for one job."""
    prompt = job["prompt"]
    is_text = isinstance(prompt, str)
    if is_text and not prompt.isascii() and any("\ud800" <= character <= "\udfff" for character in prompt):
        raise click.UsageError("the prompt is no valid Unicode text")  # the shell handed over bytes that are no UTF-8
    body = {name: job[name] for name in ("max_tokens", "temperature", "top_p", "seed")}
    body["model"] = job["model"] or default_model
    body["stop"] = list(job["stop"]) if isinstance(job["stop"], tuple) else job["stop"]
    body |= {name: job[name] for name in _OPTIONAL_FIELDS if job.get(name) not in (None, (), {})}
    body["metaswarm"] = {name: job[name] for name in ("quality", "method", "ignore_eos")}
    if job["chat"] and not is_text:
        raise click.UsageError("a prompt of token ids is not a turn in a chat: leave out chat")
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
    """Give the URL of the node to submit to, and whether it was started just for that."""
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
    """Return the model to use; wait for a peer that has only just joined to hear of it."""
    import trio

    models: list[ModelDocument] = []
    deadline_s = trio.current_time() + timeout_s
    while True:
        models = await client.models()
        complete = [model["name"] or model["model"] for model in models if model["complete"]]
        if wanted is None and len(complete) == 1:
            return complete[0]
        if wanted is not None and any(_is_usable(model) and _is_called(model, wanted) for model in models):
            return wanted
        if trio.current_time() >= deadline_s:
            break
        await trio.sleep(DISCOVERY_INTERVAL_S)
    if wanted is not None:
        return wanted  # the node knows better what is wrong with it
    if complete:
        raise CommandError(f"several models are complete; choose one with --model: {', '.join(complete)}")
    unnamed = [model["model"][:12] for model in models if _is_usable(model)]
    if unnamed:
        raise CommandError(
            f"no model of this swarm is known here; name the one you trust with --model: {', '.join(unnamed)}"
        )
    partly = "; incomplete: " + ", ".join(model["name"] or model["model"] for model in models) if models else ""
    raise CommandError(f"no model is complete in this swarm: serve one with `metaswarm node --serve MODEL`{partly}")


def _is_usable(model: "ModelDocument") -> bool:
    """Whether a model is complete, as far as that is known: until the user names it, nothing of it is fetched."""
    return model["complete"] or (not model["local"] and bool(model["block_count"]) and not model["uncovered"])


def _is_called(model: "ModelDocument", text: str) -> bool:
    return model["name"] == text or (len(text) >= 8 and model["model"].startswith(text))


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
        print_json((await client.complete(body, _say_nothing)).document())
        return
    try:
        completion = await client.complete(body, show)
        document = completion.document()
        if document["token_ids"] and not document["text"] and isinstance(job["prompt"], list):
            show(" ".join(map(str, document["token_ids"])))
    finally:
        if line_is_open:
            click.echo()
    if sys.stderr.isatty():
        click.secho(_summarise(completion), dim=True, err=True)


def _say_nothing(text: str) -> None:
    del text


def _summarise(completion: "Completion") -> str:
    document = completion.document()
    tokens, peers = document["usage"]["completion_tokens"], len({stage["peer"] for stage in document["route"]})
    ttft, tpot, total = (format_duration(document["timing"][name]) for name in ("ttft_s", "tpot_s", "total_s"))
    return f"{tokens} tokens over {peers} peers: the first after {ttft}, then one every {tpot}, {total} in all"


async def _run_many(client: "ApiClient", jobs: Sequence[Mapping[str, Any]], default_model: str) -> None:
    """Run the jobs a few at a time; print a document for each, in their order. Raises CommandError if any failed."""
    import trio

    from node.cli.client import RefusedError

    documents: dict[int, dict[str, Any]] = {}
    printed = failed = 0
    limiter = trio.CapacityLimiter(CONCURRENCY)

    async def run(index: int, job: Mapping[str, Any]) -> None:
        nonlocal printed, failed
        async with limiter:
            try:
                completion = await _complete_when_there_is_room(client, make_body(job, default_model))
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
        raise CommandError(f"{failed} of {len(jobs)} jobs failed; their lines say why")


async def _complete_when_there_is_room(client: "ApiClient", body: dict[str, Any]) -> "Completion":
    """Submit a job, again while the peers are full or its method is being measured.

    Raises RefusedError for every other reason, and when time is up.
    """
    import trio

    from node.cli.client import RefusedError

    deadline_s = trio.current_time() + FULL_TIMEOUT_S
    while True:
        try:
            return await client.complete(body, _say_nothing)
        except RefusedError as error:
            if error.code not in WORTH_WAITING or error.retry_after_s is None or trio.current_time() > deadline_s:
                raise
            pause_s = error.retry_after_s * random.uniform(*FULL_SPREAD)
        await trio.sleep(pause_s)
