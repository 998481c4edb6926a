"""What `metaswarm demo` may start instead of a daemon: a fake node behind the real API, or one that misbehaves.

STAND_IN says how: `well`, `dies` (the second one, before it is ready), `dies late` (once it was) or `stubborn`.
"""

import json
import os
import signal
import sys
from pathlib import Path

import trio

from tests.unit.api.fakes import PEERS, FakeNode, serve_node


async def main(arguments: list[str]) -> None:
    data_dir = Path(arguments[arguments.index("--data-dir") + 1])
    number = int(data_dir.name.removeprefix("peer-"))
    (data_dir / "arguments.json").write_text(json.dumps(arguments))
    settings = {name: value for name, value in os.environ.items() if name.startswith("METASWARM_")}
    (data_dir / "settings.json").write_text(json.dumps(settings))
    behaviour = os.environ["STAND_IN"]
    print("all is well so far", file=sys.stderr)
    if behaviour == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if behaviour == "dies" and number == 2:
        sys.exit("no more\x1b of this")
    async with serve_node(FakeNode()) as url:
        ready = {
            "peer_id": PEERS[number - 1],
            "multiaddrs": [f"/ip4/127.0.0.1/tcp/{4000 + number}/p2p/{PEERS[number - 1]}"],
            "api_url": url,
            "pid": os.getpid(),
        }
        print(json.dumps(ready), flush=True)
        if behaviour == "dies late" and number == 2:
            print("no more of this", file=sys.stderr, flush=True)
            os._exit(1)
        await trio.sleep_forever()


if __name__ == "__main__":
    trio.run(main, sys.argv[1:])
