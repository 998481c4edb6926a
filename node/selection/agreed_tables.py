"""Agreed tables as JSON, in which the training worker is given them."""

from collections.abc import Mapping
from typing import Any

from protocol.consensus_values import Cell
from selector.consensus.table import AgreedCell
from selector.evidence import AgreedTable


def dump_table(table: AgreedTable) -> dict[str, Any]:
    """Return a table as JSON."""
    cells = [[*cell, entry.value, entry.support, entry.firm] for cell, entry in table.cells.items()]
    return {
        "model": table.model,
        "epoch": table.epoch,
        "digest": table.digest.hex(),
        "cells": cells,
        "members": dict(table.members),
    }


def load_table(values: Mapping[str, Any]) -> AgreedTable:
    """Return the table in JSON from `dump_table`."""
    return AgreedTable(
        model=values["model"],
        epoch=values["epoch"],
        digest=bytes.fromhex(values["digest"]),
        cells={Cell(*cell): AgreedCell(*entry) for *cell, entry in ((*row[:3], row[3:]) for row in values["cells"])},
        members=values["members"],
    )
