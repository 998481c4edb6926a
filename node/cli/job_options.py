"""The options of a job: flags of `submit`, `run` and `chat`, fields of a line of `submit --file`; and its request."""

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, TypeVar

import click

from node.cli.completion import complete_methods
from node.cli.output import CommandError

F = TypeVar("F", bound=Callable[..., Any])

JOB_OPTIONS: Final = (
    "model", "chat", "max_tokens", "temperature", "top_p", "seed", "stop", "quality", "method", "objective",
    "budget", "ignore_eos", "min_tokens", "top_k", "min_p", "repetition_penalty", "frequency_penalty",
    "presence_penalty", "logit_bias", "stop_token_ids",
)  # fmt: skip
"""Options that a line of a --file may set for itself."""

_OPTIONAL_FIELDS: Final = JOB_OPTIONS[JOB_OPTIONS.index("min_tokens") :]
"""Of those, fields of the same name in the request, sent only if given."""


class FiniteRange(click.FloatRange):
    """A finite number within a range. NaN passes every comparison, and JSON has neither it nor infinity."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Return the number, or raise BadParameter."""
        number = float(super().convert(value, param, ctx))
        if not math.isfinite(number):
            self.fail(f"{value!r} is not a finite number", param, ctx)
        return number


def task_option(verb: F) -> F:
    """Add the `--task` of verbs that describe jobs."""
    return click.option(
        "--task",
        type=click.Choice(["generate", "embed", "score"]),
        default="generate",
        show_default=True,
        help="Kind of task: a text, an embedding, or log probabilities of the prompt.",
    )(verb)


def quality_option(verb: F) -> F:
    """Add the `--quality` of every verb that runs or describes jobs."""
    return click.option(
        "--quality",
        type=click.Choice(["exact", "near", "any"]),
        default="exact",
        show_default=True,
        help="Bound on methods that may change the text.",
    )(verb)


def objective_options(verb: F) -> F:
    """Add `--objective` and `--budget` to a verb that runs or describes jobs."""
    objective = click.option(
        "--objective",
        type=click.Choice(["latency", "throughput", "cost"]),
        default="latency",
        show_default=True,
        help="Prefer the fastest job, the least computing, or the lowest cost.",
    )
    budget = click.option(
        "--budget",
        type=FiniteRange(0, min_open=True),
        metavar="COST",
        help="Highest predicted cost: seconds of computing on each peer times its --price.",
    )
    return objective(budget(verb))


def _parse_biases(texts: Sequence[str]) -> dict[str, float]:
    biases: dict[str, float] = {}
    for text in texts:
        token, _, bias = text.partition("=")
        try:
            name, value = str(int(token)), float(bias)
        except ValueError:
            name, value = token, math.nan
        if not math.isfinite(value):
            raise click.BadParameter(f"{text!r} is not TOKEN=BIAS, for example 1234=-100")
        biases[name] = value
    return biases


_Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]

_FIXED_OPTIONS: Final[Sequence[_Decorator]] = (
    click.option("--top-p", type=FiniteRange(0, 1, min_open=True), default=1.0, show_default=True, metavar="P"),
    click.option(
        "--top-k", type=click.IntRange(0), metavar="K", help="Sample from the K most likely tokens; 0: from all."
    ),
    click.option(
        "--min-p", type=FiniteRange(0, 1), metavar="P", help="Minimum probability relative to the most likely token."
    ),
    click.option(
        "--repetition-penalty",
        type=FiniteRange(0.01, 100),
        metavar="F",
        help="Factor on logits of tokens in prompt and text; 1 is off.",
    ),
    click.option(
        "--frequency-penalty", type=FiniteRange(-2, 2), metavar="F", help="Penalty for each occurrence in the text."
    ),
    click.option("--presence-penalty", type=FiniteRange(-2, 2), metavar="F", help="Penalty for tokens in the text."),
    click.option(
        "--logit-bias",
        multiple=True,
        callback=lambda _, __, values: _parse_biases(values),
        metavar="TOKEN=BIAS",
        help="Bias on the logit of a token id, -100 to 100; repeatable.",
    ),
    click.option("--seed", type=click.IntRange(-(2**63), 2**63 - 1), metavar="N", help="Seed of sampling."),
    click.option("--stop", multiple=True, metavar="TEXT", help="Stop text; repeatable, up to 64."),
    click.option(
        "--stop-token-id",
        "stop_token_ids",
        type=click.IntRange(0),
        multiple=True,
        metavar="ID",
        help="Stop token; repeatable.",
    ),
    click.option("--min-tokens", type=click.IntRange(0), metavar="N", help="Minimum number of tokens before any stop."),
    quality_option,
    click.option(
        "--method",
        default="auto",
        show_default=True,
        metavar="NAME",
        shell_complete=complete_methods,
        help="auto, or switches such as prefix_cache=on|speculation=ngram-8.",
    ),
    objective_options,
    click.option("--ignore-eos", is_flag=True, help="Continue past the end-of-text token, for measurements."),
)
"""Those with the same default everywhere."""


def job_options(*, temperature: float, max_tokens: int | None) -> Callable[[F], F]:
    """Return what adds the options of a job, with these defaults; None leaves the limit to the node."""
    limit = "Limit of new tokens." if max_tokens else "Limit of new tokens [default: as memory allows]."
    options: Sequence[Any] = (
        click.option(
            "--max-tokens",
            type=click.IntRange(1),
            default=max_tokens,
            show_default=max_tokens is not None,
            metavar="N",
            help=limit,
        ),
        click.option(
            "--temperature",
            type=FiniteRange(0, 2),
            default=temperature,
            show_default=True,
            metavar="T",
            help="Sampling temperature; 0 is greedy.",
        ),
        *_FIXED_OPTIONS,
    )

    def add(verb: F) -> F:
        for option in reversed(options):
            verb = option(verb)
        return verb

    return add


def make_body(
    job: Mapping[str, Any], default_model: str, messages: Sequence[Mapping[str, str]] | None = None
) -> dict[str, Any]:
    """Return the body of a request for one job: of its `prompt`, or of a conversation."""
    body = {name: job[name] for name in ("max_tokens", "temperature", "top_p", "seed")}
    body["model"] = job.get("model") or default_model
    body["stop"] = list(job["stop"]) if isinstance(job["stop"], tuple) else job["stop"]
    body |= {name: job[name] for name in _OPTIONAL_FIELDS if job.get(name) not in (None, (), {})}
    body["metaswarm"] = {name: job[name] for name in ("quality", "method", "objective", "ignore_eos")}
    if job["budget"] is not None:
        body["metaswarm"]["budget"] = job["budget"]
    if messages is not None:
        return body | {"messages": list(messages)}
    prompt = job["prompt"]
    is_text = isinstance(prompt, str)
    if is_text:
        check_text(prompt)
    if job["chat"] and not is_text:
        raise click.UsageError("chat requires a text prompt, not token ids")
    if job["chat"]:
        return body | {"messages": [{"role": "user", "content": prompt}]}
    return body | {"prompt": prompt}


def read_text(name: str) -> str:
    """Return the text of a file, `-` for stdin. Raises CommandError."""
    try:
        return (sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()).decode()
    except OSError as error:
        raise CommandError(f"cannot read {name}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise CommandError(f"{'the input' if name == '-' else name} is not UTF-8 text: {error}") from None


def check_text(prompt: str) -> None:
    """Raise UsageError for a prompt that is not valid Unicode."""
    if not prompt.isascii() and any("\ud800" <= character <= "\udfff" for character in prompt):
        raise click.UsageError("the prompt is not valid Unicode text")  # the shell passed bytes that are not UTF-8
