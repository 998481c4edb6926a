"""Announces weight files in the DHT, so that peers find them also at peers that do not serve the model.

A record there outlives its peer by hours; a file from it is verified by its hash.
"""

import structlog
import trio

from node.models.errors import ModelError
from node.models.store import ModelStore
from node.network.interface import Network, NetworkError
from protocol.announcements import blob_provider_key

ANNOUNCED_AGAIN_S = 12 * 3600.0
"""The records of the DHT live for a day at least."""

PACE_S = 1.0
"""Between two announcements, each of which asks many peers; servers of a model are found faster."""

ROUND_S = 10.0
"""How often new files are looked for."""

MAX_ANNOUNCED = 4096
"""Files that one node announces."""

_logger = structlog.get_logger(__name__)


async def provide_loop(network: Network, store: ModelStore) -> None:
    """Announce every weight file of the store, again before it is forgotten, until cancelled."""
    announced_s: dict[str, float] = {}
    while True:
        present: tuple[str, ...] = ()
        if network.connected_peers():
            try:
                present = await trio.to_thread.run_sync(store.weight_hashes)
            except ModelError as error:
                _logger.warning("files not announced", reason=str(error))
        kept = frozenset(present)
        announced_s = {sha256: when_s for sha256, when_s in announced_s.items() if sha256 in kept}
        for sha256 in present[:MAX_ANNOUNCED]:
            if announced_s.get(sha256, float("-inf")) + ANNOUNCED_AGAIN_S > trio.current_time():
                continue
            try:
                await network.provide(blob_provider_key(sha256))
            except NetworkError as error:
                _logger.debug("file not announced", sha256=sha256, reason=str(error))
                break
            announced_s[sha256] = trio.current_time()
            await trio.sleep(PACE_S)
        await trio.sleep(ROUND_S)
