"""`--watch`: a live view of a node's pages on the terminal, like `top`."""

import os
import signal
import sys
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

import trio

from node.cli.client import RefusedError
from node.cli.explain import short_method
from node.cli.output import CommandError, format_duration, new_table, out, plural, printable
from node.cli.status_tables import WATCH_INTERVAL_S, coverage_bar, describe_state, short_address, texts

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

    from node.cli.client import ApiClient

MAX_JOBS: Final = 12
WIDE: Final = 100
"""Columns of a terminal that shows every column of the tables."""
QUIT_KEYS: Final = b"qQ\x04"
"""Ctrl-C is a signal as ever."""

Fetch = Callable[[], Awaitable["RenderableType"]]


async def watch(fetch: Fetch) -> None:
    """Show what `fetch` returns again and again, until q is pressed: on a screen of its own, redrawn when resized."""
    from rich.live import Live
    from rich.text import Text

    shown: RenderableType = Text("connecting…")
    console = out()
    with Live(shown, console=console, screen=True, auto_refresh=False) as live, _single_keys() as keys:
        async with trio.open_nursery() as nursery:

            async def quit_on_key() -> None:
                while keys is not None:
                    await trio.lowlevel.wait_readable(keys)
                    pressed = os.read(keys, 64)
                    if not pressed or any(key in QUIT_KEYS for key in pressed):
                        nursery.cancel_scope.cancel()
                        return

            async def redraw_on_resize() -> None:
                with trio.open_signal_receiver(signal.SIGWINCH) as signals:
                    async for _ in signals:
                        live.refresh()

            nursery.start_soon(quit_on_key)
            nursery.start_soon(redraw_on_resize)
            while True:
                try:
                    shown = await fetch()
                except CommandError as error:
                    shown = Text(f"{printable(error.format_message())}\n\ntrying again; q quits")
                live.update(shown, refresh=True)
                await trio.sleep(WATCH_INTERVAL_S)


@contextmanager
def _single_keys() -> Iterator[int | None]:
    """Have keys delivered at once and not shown; yield where they come from, None without a keyboard."""
    if not sys.stdin.isatty():
        yield None
        return
    import termios
    import tty

    keyboard = sys.stdin.fileno()
    former = termios.tcgetattr(keyboard)
    try:
        tty.setcbreak(keyboard, termios.TCSANOW)
        yield keyboard
    finally:
        termios.tcsetattr(keyboard, termios.TCSADRAIN, former)


class Overview:
    """The view of `metaswarm status --watch`: peers, blocks, jobs, tokens per second and load."""

    def __init__(self, client: "ApiClient") -> None:
        self._client = client
        self._rates = {"tokens": _Rates(), "compute": _Rates()}

    async def fetch(self) -> "RenderableType":
        """Return the view as of now."""
        status = await self._client.request("GET", "/swarm/status")
        peers = (await self._client.request("GET", "/swarm/peers"))["peers"]
        models = (await self._client.request("GET", "/swarm/models"))["models"]
        try:
            jobs = (await self._client.request("GET", "/swarm/jobs"))["jobs"]
        except RefusedError:  # of an earlier version
            jobs = []
        return self.render(status, peers, models, jobs, trio.current_time())

    def render(
        self,
        status: Mapping[str, Any],
        peers: Sequence[Mapping[str, Any]],
        models: Sequence[Mapping[str, Any]],
        jobs: Sequence[Mapping[str, Any]],
        now_s: float,
    ) -> "RenderableType":
        """Return the view of these pages."""
        from rich.console import Group
        from rich.text import Text

        tokens, compute = self._rates["tokens"], self._rates["compute"]
        speeds = tokens.update({job["job_id"]: job["tokens"] for job in jobs if not job["trial"]}, now_s)
        spans = {f"{span['model']}{span['start']}": span["compute_s"] for span in status["spans"]}
        busy = compute.update(spans, now_s)
        counts = status["jobs"]
        head = (
            f"{printable(status['peer_id'])}  {status['state']} for {format_duration(status['uptime_s'])}  "
            f"{status['api_url']}\n"
            f"{sum(speeds.values()):.1f} tokens/s   jobs {counts['running']} running, {counts['done']} done, "
            f"{counts['failed']} failed   load {_percent(busy)}   "
            f"{plural(status['connected_peers'], 'peer')} connected   q quits"
        )
        is_narrow = out().width < WIDE
        tables = [_peers_table(status, peers, busy, is_narrow=is_narrow), _models_table(models)]
        if jobs:
            tables.append(_jobs_table(jobs, speeds, is_narrow=is_narrow))
        return Group(Text(head, style="bold"), *tables)


class _Rates:
    """Counters that grow, and how fast they did between the last two looks."""

    def __init__(self) -> None:
        self._seen: dict[str, float] = {}
        self._seen_s: float | None = None

    def update(self, counters: Mapping[str, float], now_s: float) -> dict[str, float]:
        """Take the counters as of now, and return the growth of each a second; one that is new grew from 0."""
        elapsed_s = now_s - self._seen_s if self._seen_s is not None else 0.0
        rates = {
            name: max(0.0, (count - self._seen.get(name, 0.0)) / elapsed_s) if elapsed_s > 0 else 0.0
            for name, count in counters.items()
        }
        self._seen, self._seen_s = dict(counters), now_s
        return rates


def _percent(busy: Mapping[str, float]) -> str:
    return f"{min(1.0, sum(busy.values()) / len(busy)):.0%}" if busy else "-"


def _table(rows: Sequence[Mapping[str, object]], headings: Sequence[str]) -> "Table":
    """Return a table of rows by heading; a heading that starts with `>` is right-aligned."""
    table = new_table(*headings)
    for row in rows:
        table.add_row(*texts(*(row[heading.removeprefix(">")] for heading in headings)))
    return table


def _peers_table(
    status: Mapping[str, Any], peers: Sequence[Mapping[str, Any]], busy: Mapping[str, float], *, is_narrow: bool
) -> "Table":
    own = {"peer_id": status["peer_id"], "addresses": status["multiaddrs"], "spans": status["spans"], "rtt_s": None}
    rows = []
    for peer in (own, *sorted(peers, key=lambda peer: (not peer["connected"], peer["peer_id"]))):
        spans = peer["spans"]
        step_s = max((span.get("step_s", 0.0) for span in spans), default=0.0)
        rows.append(
            {
                "peer": peer["peer_id"][-8:],
                "address": short_address(peer["addresses"]),
                "state": "this node" if peer is own else describe_state(peer),
                "round trip": "" if peer["rtt_s"] is None else f"{peer['rtt_s'] * 1000:.1f} ms",
                "blocks": ", ".join(f"{_name(span)}:{span['start']}-{span['end']}" for span in spans),
                "sessions": sum(span.get("sessions", 0) for span in spans) if spans else "",
                "queued": sum(span.get("queued_rows", 0) for span in spans) if spans else "",
                "step": f"{step_s * 1000:.0f} ms" if step_s else "",
                "load": _percent(busy) if peer is own and spans else "",
            }
        )
    wide = ("peer", "address", "state", ">round trip", "blocks", ">sessions", ">queued", ">step", ">load")
    return _table(rows, ("peer", "state", "blocks", ">sessions", ">step") if is_narrow else wide)


def _name(span: Mapping[str, Any]) -> str:
    name: str = span["name"]
    return name


def _models_table(models: Sequence[Mapping[str, Any]]) -> "Table":
    table = new_table("model", "peers for each block", "state")
    for model in models:
        missing = ", ".join(f"{start}-{end}" for start, end in model["uncovered"])
        state = "complete" if model["complete"] else f"{missing} not served" if missing else "incomplete"
        table.add_row(*texts(_name(model), coverage_bar(model["coverage"]), state))
    return table


def _jobs_table(jobs: Sequence[Mapping[str, Any]], speeds: Mapping[str, float], *, is_narrow: bool) -> "Table":
    """Return the running jobs and the last ones that ended, the newest first."""
    order = sorted(jobs, key=lambda job: (job["state"] not in {"opening", "running"}, -job["submitted_at"]))
    rows = [
        {
            "job": job["job_id"][:8],
            "model": _name(job),
            "state": f"{'' if job['task'] == 'generate' else job['task'] + ' '}{job['state']}"
            f"{' (trial)' if job['trial'] else ''}",
            "prompt": job["prompt_tokens"],
            "tokens": job["tokens"],
            "tokens/s": f"{speed:.1f}" if (speed := speeds.get(job["job_id"], 0.0)) else "",
            "route": " > ".join(f"{stage['peer'][-4:]}:{stage['start']}-{stage['end']}" for stage in job["route"]),
            "method": short_method(job["method"]) if job["method"] else "",
        }
        for job in order[:MAX_JOBS]
    ]
    wide = ("job", "model", "state", ">prompt", ">tokens", ">tokens/s", "route", "method")
    return _table(rows, ("job", "state", ">tokens", ">tokens/s") if is_narrow else wide)
