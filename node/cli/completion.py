"""What a shell completes beside verbs and options: models and peers that are known here.

The names come from the node on this machine and from the user's cache. Whatever fails completes nothing, in silence:
the shell shows what is printed while the user types. Until it is asked it imports nothing but click and the
standard library.
"""

import json
from collections.abc import Iterable
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import click
from click.shell_completion import CompletionItem

TIMEOUT_S: Final = 0.4
"""How long the node on this machine may take to answer."""


def complete_models(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Complete names of models in the swarm, in the cache and in the catalogue."""
    del parameter
    shown = {model["name"]: _help(model) for model in _ask(context, "/swarm/models", "models")}
    return _matching({**_local_models(context), **shown}, incomplete)


def complete_local_models(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Complete names of models in the cache and in the catalogue."""
    del parameter
    return _matching(_local_models(context), incomplete)


def complete_sources(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Complete what a model is imported from: names of the catalogue, else files."""
    del context, parameter
    from node.models.catalogue import CATALOGUE

    titles = {entry.name: entry.title for entry in CATALOGUE.values()}
    return _matching(titles, incomplete) or [CompletionItem(incomplete, type="file")]


def complete_peers(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Complete addresses of the node on this machine and of the peers that it knows, or a file."""
    del parameter
    if not incomplete.startswith("/ip") and not "/ip".startswith(incomplete):
        return [CompletionItem(incomplete, type="file")]
    found: dict[str, str] = {}
    if isinstance(status := _get(context, "/swarm/status"), dict):
        found |= dict.fromkeys(status["multiaddrs"], "this machine")
    for peer in _ask(context, "/swarm/peers", "peers"):
        for address in peer["addresses"][:1]:
            suffix = f"/p2p/{peer['peer_id']}"
            found[address if address.endswith(suffix) else address + suffix] = peer["agent"]
    return _matching(found, incomplete) or [CompletionItem(incomplete, type="file")]


def complete_methods(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Complete the names that every model has."""
    del context, parameter
    return _matching({"auto": "the swarm votes", "baseline": "no acceleration"}, incomplete)


def _matching(names: dict[str, str], incomplete: str) -> list[CompletionItem]:
    return [CompletionItem(name, help=names[name]) for name in sorted(names) if name.startswith(incomplete)]


def _help(model: dict[str, Any]) -> str:
    return f"{model['block_count']} blocks, {'complete' if model['complete'] else 'incomplete'}"


def _local_models(context: click.Context) -> dict[str, str]:
    from node.config import default_cache_dir
    from node.models.catalogue import CATALOGUE
    from node.util.paths import expand

    names = {entry.name: entry.title for entry in CATALOGUE.values()}
    try:
        folder = Path(context.params.get("cache_dir") or _variable("CACHE_DIR") or default_cache_dir())
        given = json.loads((expand(folder) / "names.json").read_bytes())
        return {**dict.fromkeys(map(str, given), "in the cache"), **names}
    except (OSError, ValueError, TypeError):
        return names


def _ask(context: click.Context, path: str, key: str) -> Iterable[dict[str, Any]]:
    """Return the list in a page of the node's API; empty without one."""
    answer = _get(context, path)
    found = answer.get(key) if isinstance(answer, dict) else None
    return found if isinstance(found, list) else []


def _get(context: click.Context, path: str) -> Any:
    """Return a page of the API of the node that the command line means, or None."""
    from node.config import DEFAULT_API, NodeReady, chosen_data_dir

    given = context.params.get("api") or _variable("API")
    if not isinstance(given, str):  # of `node` it is another thing: where to listen
        given = None
    ready = None if given else NodeReady.read(chosen_data_dir())
    url = given or (ready.api_url if ready else DEFAULT_API)
    key = (_variable("API_KEY") or "").strip()
    try:
        parts = urlsplit(url if "://" in url else f"http://{url}")
        if parts.scheme != "http" or not parts.hostname:
            return None
        connection = HTTPConnection(parts.hostname, parts.port, timeout=TIMEOUT_S)
        connection.request("GET", path, headers={"Authorization": f"Bearer {key}"} if key else {})
        answer = connection.getresponse()
        return json.loads(answer.read()) if answer.status == 200 else None
    except (OSError, HTTPException, ValueError):
        return None


def _variable(name: str) -> str | None:
    import os

    from node.config import ENVIRONMENT_PREFIX

    return os.environ.get(f"{ENVIRONMENT_PREFIX}{name}")
