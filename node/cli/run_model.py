"""`metaswarm run MODEL`: starts what is needed, and answers."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from node.api.model_lookup import find_model
from node.cli.chat import Conversation, answer, converse
from node.cli.completion import complete_models
from node.cli.job_options import job_options, read_text
from node.cli.local_node import local_node
from node.cli.option_types import TEXT
from node.cli.output import CommandError, api_option, bootstrap_option, json_option, progress_bars
from node.cli.target import is_there, on_node
from protocol.identity import ModelId

if TYPE_CHECKING:
    from node.api.interface import ModelDocument
    from node.models.store import ModelStore, Package

LISTED_TIMEOUT_S: Final = 5.0
"""Longest wait until a node lists the model that it serves."""


@click.command("run")
@click.argument("model", type=TEXT, metavar="MODEL", shell_complete=complete_models)
@click.argument("prompt", required=False)
@api_option
@bootstrap_option
@click.option("--system", metavar="TEXT", help="System message.")
@job_options(temperature=0.7, max_tokens=None)
@json_option
def run(
    model: str,
    prompt: str | None,
    api: str | None,
    bootstrap: tuple[str, ...],
    system: str | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Answer PROMPT (`-` reads stdin) with MODEL, or converse if there is no PROMPT.

    Where the node on this machine, or the swarm of --bootstrap, has the model, it is asked. Else the model is imported
    (see `metaswarm model import`), and a node serves it while this command runs. What was imported before is not
    imported again: of a hub repository `metaswarm model import` gets a newer commit.
    """
    text = read_text("-") if prompt == "-" else prompt
    with _node_with(model, api, bootstrap) as (url, name):
        conversation = Conversation(name, options, system)
        if text is None:
            converse(url, conversation, as_json=as_json)
        else:
            answer(url, conversation, text, as_json=as_json)


@contextmanager
def _node_with(model: str, api: str | None, bootstrap: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """Yield the URL of a node in whose swarm the model is complete, and the name by which it knows it."""
    from node.cli.client import ApiClient, find_api
    from node.cli.target import DISCOVERY_TIMEOUT_S, choose_model, may_be_id, require_complete

    url = find_api(api)
    if api is not None or is_there(url):
        models = on_node(url, ApiClient.models)
        if api is not None or ((found := find_model(model, models)) and found["complete"]):
            yield url, require_complete(models, model)
            return
        store = _store()
        if may_be_id(model) and not _can_import(store, model):
            yield url, require_complete(models, model)
            return
        served = {each["model"]: each["name"] or each["model"] for each in models if each["complete"]}
        known_id = _known_id(store, model)
        model_id = known_id if known_id and known_id in served else _import(store, model, known_id)
        if model_id in served:  # under another name than it was asked for by
            yield url, served[model_id]
            return
        # It joins the swarm of the node here: what that one serves of the model need not be served again.
        name, bootstrap = store.name_of(model_id), tuple(on_node(url, ApiClient.status)["multiaddrs"][:1])
        with local_node(name, bootstrap, share_data_dir=False) as own_url:
            yield own_url, _served(own_url, name)
        return
    if bootstrap:
        with local_node(None, bootstrap, share_data_dir=False) as own_url:
            on_node(own_url, lambda client: choose_model(client, model, DISCOVERY_TIMEOUT_S))
            yield own_url, require_complete(on_node(own_url, ApiClient.models), model)
        return
    store = _store()
    name = store.name_of(_import(store, model, _known_id(store, model)))
    with local_node(name, (), share_data_dir=True) as own_url:
        yield own_url, _served(own_url, name)


def _store() -> "ModelStore":
    from node.cli.options import read_cache_dir
    from node.models.store import ModelStore

    return ModelStore(read_cache_dir())


def _known_id(store: "ModelStore", model: str) -> ModelId | None:
    """Return which model a name, an id or an imported source means; None for a source that may be imported."""
    from node.models.errors import ModelError
    from node.models.importer import model_of

    try:
        return store.resolve(model)
    except ModelError:
        if "/" not in model and not Path(model).exists():  # only the store knows what it could be
            raise
    return model_of(model, store.cache_dir)


def _import(store: "ModelStore", model: str, model_id: ModelId | None) -> ModelId:
    """Return the id of a model in the user's cache; one that is not there, or not all of it, is imported."""
    from node.models.importer import import_model

    package = None if model_id is None else store.find(model_id)
    if package is not None and not package.missing():
        return package.model_id
    source: str | None = model
    if model_id is not None and "/" not in model and not Path(model).exists():  # a name or an id
        source = _source_of(store, model_id)
    if source is None:
        missing = "it" if package is None else _missing(package)
        raise CommandError(
            f"cannot run {model}: {missing} is not on this machine, and its source is not known: import it with "
            "`metaswarm model import SOURCE`"
        )
    with progress_bars() as progress:
        return import_model(source, store, progress=progress).model_id


def _can_import(store: "ModelStore", model_id: str) -> bool:
    """Return whether the model of an id is in the user's cache, whole or in part, or can be imported into it."""
    from node.models.errors import ModelError
    from node.models.store import UnknownModelError

    try:
        found = store.resolve(model_id)
        return store.find(found) is not None or _source_of(store, found) is not None
    except UnknownModelError:
        return Path(model_id).exists()
    except ModelError:  # ambiguous: the import says so
        return True


def _source_of(store: "ModelStore", model_id: ModelId) -> str | None:
    from node.models.catalogue import catalogued_as
    from node.models.source_index import source_of_model

    return catalogued_as(model_id) or source_of_model(store.cache_dir, model_id)


def _missing(package: "Package") -> str:
    """Name the blocks that are not here, or else the other files."""
    from node.cli.models import block_ranges

    blocks = [number for number, file in enumerate(package.manifest.blocks) if not package.has(file)]
    if blocks:
        return f"what blocks {', '.join(block_ranges(blocks))} need"
    return ", ".join(file.name for file in package.missing())


def _served(url: str, name: str) -> str:
    """Return the model once the swarm of the node that serves it has all of it. Raises CommandError."""
    from node.cli.client import ApiClient
    from node.cli.target import choose_model

    on_node(url, lambda client: choose_model(client, name, LISTED_TIMEOUT_S))
    models: list[ModelDocument] = on_node(url, ApiClient.models)
    found = find_model(name, models)
    if found is None:
        raise CommandError(f"the node that serves {name} does not list it: see `metaswarm doctor`")
    if not found["complete"]:
        missing = ", ".join(f"{start}-{end}" for start, end in found["uncovered"])
        raise CommandError(
            f"this machine has no memory for blocks {missing} of {name}: serve them on others, and join them here "
            "with --bootstrap; `metaswarm node --help`"
        )
    return name
