"""The kinds of DHT records: one namespace of the network, with a validator for each kind."""

import time
from collections.abc import Callable, Sequence

from node.network.interface import Network, RecordValidator
from protocol.announcements import DHT_NAMESPACE
from protocol.records import select


class RecordKinds:
    """The kinds of records under `/metaswarm/<kind>/…`.

    A network accepts one validator per namespace, while several packages define kinds of records. The better one of
    two records under a key is selected in the same way for all kinds.
    """

    def __init__(self, network: Network, wall_clock: Callable[[], float] = time.time) -> None:
        self._wall_clock = wall_clock
        self._validators: dict[str, RecordValidator] = {}
        network.register_record(DHT_NAMESPACE, self._validate, self._select)

    def register(self, kind: str, validator: RecordValidator) -> None:
        """Accept records of one kind; before the network runs."""
        if kind in self._validators:
            raise ValueError(f"records of the kind {kind!r} are registered already")
        self._validators[kind] = validator

    def _validate(self, key: str, value: bytes) -> bool:
        parts = key.split("/", 3)
        validator = self._validators.get(parts[2]) if len(parts) == 4 else None
        return validator is not None and validator(key, value)

    def _select(self, key: str, values: Sequence[bytes]) -> int:
        del key
        return select(values, self._wall_clock())
