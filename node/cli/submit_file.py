"""`metaswarm submit --file`: many jobs from a file of JSON lines, several at a time; interrupted, it goes on later.

A line is a prompt with options, or a request as batches of the OpenAI API have them, which may be for embeddings, too.
"""

import hashlib
import json
import random
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from node.cli.job_options import JOB_OPTIONS, make_body, read_text
from node.cli.json_lines import ResultFile
from node.cli.output import CommandError, print_error, print_json, progress_bars
from node.util.suggestions import did_you_mean

if TYPE_CHECKING:
    from node.cli.client import ApiClient, BatchResponse

RETRIED_CODES: Final = frozenset({
    "peers_full", "quality_being_measured", "rate_limit_exceeded", "too_many_requests", "too_many_connections",
})  # fmt: skip
"""Error codes after which a job is submitted again."""
RETRY_TIMEOUT_S: Final = 600.0
"""Longest time in which a job is retried."""
RETRY_JITTER: Final = (0.5, 1.5)
"""Factors of Retry-After, so that jobs refused together do not retry together."""
BATCH_URLS: Final = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings")
"""What a line in the OpenAI API's batch format may ask for."""
MAX_SHOWN: Final = 5
"""Errors of jobs that are shown on stderr; the rest are counted."""


def read_jobs(path: Path, options: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the jobs of a file, each line's own settings over `options`, with its number as `line`.

    Raises UsageError that names the line.
    """
    text = read_text(str(path))
    jobs: list[dict[str, Any]] = []
    lines_of_names: dict[str, int] = {}
    for number, line in enumerate(text.split("\n"), 1):  # `splitlines` also cuts JSON at U+2028 and the like
        if not line.strip():
            continue
        try:
            job = json.loads(line, parse_constant=_refuse_constant)
        except ValueError as error:
            raise click.UsageError(f"{path}, line {number}: not valid JSON: {error}") from None
        where = f"{path}, line {number}"
        if isinstance(job, dict) and "body" in job:
            request = _batch_request(job, where)
            first = lines_of_names.setdefault(request["custom_id"], number)
            if first != number:
                raise click.UsageError(f"{where}: custom_id {request['custom_id']!r} is also that of line {first}")
            jobs.append({**request, "line": number})
            continue
        prompt = job.get("prompt") if isinstance(job, dict) else None
        is_token_ids = isinstance(prompt, list) and all(type(token) is int for token in prompt)
        if not is_token_ids and not isinstance(prompt, str):
            raise click.UsageError(f'{where}: expected an object with a "prompt", text or token ids')
        unknown = job.keys() - {"prompt", *JOB_OPTIONS}
        if unknown:
            name = min(unknown)
            hint = did_you_mean(name, JOB_OPTIONS) or f"; the options are {', '.join(JOB_OPTIONS)}"
            raise click.UsageError(f"{where}: unknown option {name!r}{hint}")
        _check_model(job.get("model"), where)
        jobs.append({**options, **job, "line": number})
    if not jobs:
        raise click.UsageError(f"{path} contains no prompts")
    return jobs


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number in JSON")


def _batch_request(job: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return a request in the OpenAI API's batch format. Raises UsageError."""
    body, url, name = job["body"], job.get("url"), job.get("custom_id")
    if unknown := job.keys() - {"custom_id", "method", "url", "body"}:
        raise click.UsageError(f"{where}: unknown field {min(unknown)!r} of a batch request")
    if not isinstance(name, str) or not isinstance(body, dict) or job.get("method", "POST") != "POST":
        raise click.UsageError(f'{where}: expected "custom_id", a text, "body", an object, and the method POST')
    if url not in BATCH_URLS:
        raise click.UsageError(f"{where}: url is {url!r}: expected {', '.join(BATCH_URLS)}")
    if body.get("stream"):
        raise click.UsageError(f"{where}: leave out stream, as an answer is one line")
    _check_model(body.get("model"), where)
    return {"model": body.get("model"), "custom_id": name, "url": url, "body": body}


def _check_model(model: Any, where: str) -> None:
    """Raise UsageError where a model is not a name."""
    if model is not None and not isinstance(model, str):
        raise click.UsageError(f"{where}: model is {json.dumps(model)}: expected its name")


def _request_of(job: Mapping[str, Any], default_model: str) -> dict[str, Any]:
    """Return the body of a job's request; of a line in the batch format with what is around it."""
    if "body" not in job:
        return make_body(job, default_model)
    body = {**job["body"], "model": job["model"] or default_model}
    return {"custom_id": job["custom_id"], "url": job["url"], "body": body}


async def run_file(
    client: "ApiClient", jobs: Sequence[Mapping[str, Any]], default_model: str, *, output: Path | None, concurrency: int
) -> None:
    """Run the jobs. Their documents go to stdout, in order, or to `output`. Raises CommandError if any failed."""
    bodies = {job["line"]: _request_of(job, default_model) for job in jobs}
    sink: _Printed | _Saved = _Printed(list(bodies)) if output is None else _Saved(output, bodies)
    left = [line for line in bodies if line not in sink.done]
    errors: dict[int, str] = {}

    with ExitStack() as bars:
        # Beside documents on the terminal a bar would only be in the way.
        has_bar = sys.stderr.isatty() and (output is not None or not sys.stdout.isatty())
        show = bars.enter_context(progress_bars()) if has_bar else None
        try:
            await _run_jobs(client, {line: bodies[line] for line in left}, sink, errors, show, concurrency)
        except BaseException:
            if isinstance(sink, _Saved):
                bars.close()
                done = len(sink.done)
                click.echo(f"{done} of {len(bodies)} answers are in {output}; rerun the command to resume", err=True)
            raise
    sink.finish()
    if errors:
        if output is not None:
            for line, message in sorted(errors.items())[:MAX_SHOWN]:
                print_error(f"line {line}: {message}")
        where = "see their lines" if output is None else f"the same command tries them again; {output} has the others"
        raise CommandError(f"{len(errors)} of {len(bodies)} jobs failed: {where}")


async def _run_jobs(
    client: "ApiClient",
    bodies: Mapping[int, dict[str, Any]],
    sink: "_Printed | _Saved",
    errors: dict[int, str],
    show: Callable[[str, int, int], None] | None,
    concurrency: int,
) -> None:
    import trio

    from node.cli.client import NodeLostError

    left = iter(bodies.items())
    total = len(bodies) + len(sink.done)
    ended = len(sink.done)

    def advance() -> None:
        if show is not None:
            show("jobs", ended, total)

    async def run_one_by_one() -> None:
        nonlocal ended
        for line, body in left:  # which the tasks share
            try:
                document = await _answer_with_retry(client, body)
            except CommandError as error:
                if isinstance(error, NodeLostError) and not await client.is_there():
                    raise
                errors[line] = error.message
                sink.failed(line, body, error)
            else:
                sink.add(line, document)
            ended += 1
            advance()

    advance()
    async with trio.open_nursery() as nursery:
        for _ in range(concurrency):
            nursery.start_soon(run_one_by_one)


class _Printed:
    """Prints the documents in the order of the lines."""

    def __init__(self, lines: Sequence[int]) -> None:
        self.done: set[int] = set()
        self._lines = iter(lines)
        self._next = next(self._lines)
        self._waiting: dict[int, dict[str, Any]] = {}

    def add(self, line: int, document: dict[str, Any]) -> None:
        """Print a document once those before it are."""
        self._waiting[line] = document
        while self._next in self._waiting:
            print_json(self._waiting.pop(self._next))
            self._next = next(self._lines, -1)

    def failed(self, line: int, body: Mapping[str, Any], error: CommandError) -> None:
        """Print an error in its place."""
        described = {"message": error.message, "code": getattr(error, "code", None)}
        if "custom_id" not in body:
            self.add(line, {"error": described})
        elif (response := getattr(error, "response", None)) is not None:
            self.add(line, _batch_result(body, response=response))
        else:
            self.add(line, _batch_result(body, error=described))

    def finish(self) -> None:
        """Do nothing: all is printed."""


class _Saved:
    """Appends each document to a file as soon as its job is done; failed jobs are left out, to be tried again.

    A line of the file says which line of the prompts it answers, and by `request` which request: a digest, so that
    answers to other prompts are not taken for these.
    """

    def __init__(self, path: Path, bodies: Mapping[int, dict[str, Any]]) -> None:
        self._file = ResultFile(path, ("line", "request"), "metaswarm submit --file")
        self._digests = {line: _digest(body) for line, body in bodies.items()}
        self._results = {result["line"]: result for result in self._file.read()}
        for line, result in self._results.items():
            if self._digests.get(line) != result.get("request"):
                raise CommandError(
                    f"{path} answers other prompts or options, first in line {line}: "
                    "repeat the command as it was, or choose another --output"
                )
        self._file.check_writable()

    @property
    def done(self) -> set[int]:
        """The lines that have an answer."""
        return set(self._results)

    def add(self, line: int, document: dict[str, Any]) -> None:
        """Write a document."""
        result = {"line": line, "request": self._digests[line], **document}
        self._file.append(result)
        self._results[line] = result

    def failed(self, line: int, body: Mapping[str, Any], error: CommandError) -> None:
        """Do nothing: the next run tries it again."""

    def finish(self) -> None:
        """Put the lines in order."""
        self._file.rewrite(result for _, result in sorted(self._results.items()))


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()[:16]


def _batch_result(
    body: Mapping[str, Any], *, response: "BatchResponse | None" = None, error: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Return the line that answers a request of a batch. `error`: where there was no response, not even a refusal."""
    return {"id": f"batch_req_{_digest(body)}", "custom_id": body["custom_id"], "response": response, "error": error}


async def _answer(client: "ApiClient", body: dict[str, Any]) -> dict[str, Any]:
    """Submit a job once; return its document."""
    if "url" not in body:
        return (await client.complete(body)).document()
    return _batch_result(body, response=await client.respond(body["url"], body["body"]))


async def _answer_with_retry(client: "ApiClient", body: dict[str, Any]) -> dict[str, Any]:
    """Submit a job, with retries while peers are full or its method is being measured. Raises RefusedError."""
    import trio

    from node.cli.client import RefusedError

    deadline_s = trio.current_time() + RETRY_TIMEOUT_S
    while True:
        try:
            return await _answer(client, body)
        except RefusedError as error:
            if error.code not in RETRIED_CODES or error.retry_after_s is None or trio.current_time() > deadline_s:
                raise
            pause_s = error.retry_after_s * random.uniform(*RETRY_JITTER)
        await trio.sleep(pause_s)
