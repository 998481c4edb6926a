"""Which node and which model a verb means: `--api`, `--bootstrap` and `--model` of every verb that runs jobs."""

import signal
import sys
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final, TypeVar

from node.api.model_lookup import find_model
from node.cli.output import CommandError
from node.models.id_prefix import ID_PREFIX
from node.util.suggestions import did_you_mean

if TYPE_CHECKING:
    from node.api.interface import ModelDocument
    from node.cli.client import ApiClient

T = TypeVar("T")

DISCOVERY_TIMEOUT_S: Final = 20.0
"""Longest time in which a peer that has just joined discovers the model."""
DISCOVERY_INTERVAL_S: Final = 0.25


@contextmanager
def node_for_command(api: str | None, bootstrap: Sequence[str]) -> Iterator[tuple[str, bool]]:
    """Yield the URL of the node to ask, and whether it was started for that: with `bootstrap`, and without one here."""
    from node.cli.client import find_api
    from node.cli.local_node import local_node

    url = find_api(api)
    if not bootstrap or api is not None or is_there(url):
        yield url, False
        return
    with local_node(None, bootstrap, share_data_dir=False) as own_url:
        yield own_url, True


def is_there(url: str) -> bool:
    """Return whether a node answers at a URL."""
    from node.cli.client import ApiClient

    return on_node(url, ApiClient.is_there)


def on_node(url: str, act: Callable[["ApiClient"], Awaitable[T]]) -> T:
    """Return what a function of a client returns.

    Raises what it raised, KeyboardInterrupt, and SystemExit on SIGTERM and SIGHUP: the caller may still have to end a
    node of its own.
    """
    import trio

    from node.cli.client import open_client

    async def exit_on_signals(*, task_status: "trio.TaskStatus") -> None:
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGHUP) as signals:
            task_status.started()
            async for number in signals:
                sys.exit(128 + number)

    async def run() -> T:
        async with trio.open_nursery() as nursery, open_client(url) as client:
            await nursery.start(exit_on_signals)
            found = await act(client)
            nursery.cancel_scope.cancel()
        return found

    try:
        return trio.run(run)
    except BaseExceptionGroup as group:
        raise _first_of(group.subgroup((KeyboardInterrupt, SystemExit)) or group) from None


def _first_of(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """Return an exception of a group that is none itself."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


async def choose_model(client: "ApiClient", wanted: str | None, timeout_s: float = 0.0) -> str:
    """Return the model to use; wait until a peer that has just joined discovers it."""
    import trio

    deadline_s = trio.current_time() + timeout_s
    while True:
        models = await client.models()
        complete = complete_names(models)
        if wanted is None and len(complete) == 1:
            return complete[0]
        usable = [model for model in models if _is_usable(model)]
        if wanted is not None and find_model(wanted, usable) is not None:
            return wanted
        if trio.current_time() >= deadline_s:
            break
        await trio.sleep(DISCOVERY_INTERVAL_S)
    if wanted is not None:
        return wanted  # the node reports what is wrong with it
    if complete:
        raise CommandError(f"several models are complete; choose one with --model: {', '.join(complete)}")
    if unnamed := ", ".join(model["name"] for model in usable if not model["local"]):
        raise CommandError(f"models of unknown origin only; choose one that you trust with --model: {unnamed}")
    partly = "; incomplete: " + ", ".join(map(_describe_incomplete, models)) if models else ""
    raise CommandError(f"no model is complete in this swarm: serve one with `metaswarm node --serve MODEL`{partly}")


def _describe_incomplete(model: "ModelDocument") -> str:
    """Name a model and the blocks that no peer serves, if they are known."""
    name = model["name"] or model["model"]
    return f"{name} (no peer serves blocks {_missing(model)})" if model["uncovered"] else name


def _missing(model: "ModelDocument") -> str:
    return ", ".join(f"{start}-{end}" for start, end in model["uncovered"])


def complete_names(models: Sequence["ModelDocument"]) -> list[str]:
    """Return the names, or else ids, of complete models."""
    return [model["name"] or model["model"] for model in models if model["complete"]]


def may_be_id(wanted: str) -> bool:
    """Return whether a text could be the beginning of a model's id."""
    return ID_PREFIX.fullmatch(wanted) is not None


def require_complete(models: Sequence["ModelDocument"], wanted: str) -> str:
    """Return the model that a user means. Raises CommandError unless it is complete, with what is.

    An id that is not listed is for the node to resolve: it lists only some models of which it has no manifest.
    """
    model = find_model(wanted, models)
    if model is not None and not _is_usable(model):
        serve = f"`metaswarm node --serve {wanted}` on further machines"
        raise CommandError(f"no peer serves blocks {_missing(model)} of {wanted}: {serve}")
    if model is not None or may_be_id(wanted):
        return wanted
    names = complete_names(models)
    which = f"; the swarm serves {', '.join(names)}" if names else "; the swarm serves none"
    raise CommandError(f"no model {wanted!r} in the swarm{did_you_mean(wanted, names) or which}")


def _is_usable(model: "ModelDocument") -> bool:
    """Return whether all blocks are served. The manifest is fetched, and peers that are apart tried, for the job."""
    return bool(model["block_count"]) and not model["uncovered"]
