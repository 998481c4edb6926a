"""The dataset as a Parquet file. pyarrow does the work where it is installed; nothing else here needs it."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from node.storage.dataset import DatasetError, to_row
from protocol.observations import SignedObservation

_Rows = Sequence[SignedObservation]


class ParquetFile:
    """A Parquet file that is being written."""

    def __init__(self, writer: Any, pyarrow: Any) -> None:
        self._writer = writer
        self._pyarrow = pyarrow

    def write(self, observations: _Rows) -> None:
        """Append some observations, as a row group of their own."""
        rows = [_tabular(to_row(signed)) for signed in observations]
        self._writer.write_table(self._pyarrow.Table.from_pylist(rows, schema=self._writer.schema))


@contextmanager
def create_parquet(path: Path) -> Iterator[ParquetFile]:
    """Write a Parquet file inside the block. Raises DatasetError where pyarrow is missing."""
    pyarrow, parquet = _libraries()
    with parquet.ParquetWriter(path, _schema(pyarrow), compression="zstd") as writer:
        yield ParquetFile(writer, pyarrow)


def read_parquet(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a Parquet file as `to_row` made them. Raises DatasetError for what is no such file."""
    pyarrow, parquet = _libraries()
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=500):
                for row in batch.to_pylist():
                    yield _plain(row)
    except (pyarrow.ArrowException, KeyError, TypeError) as error:
        raise DatasetError(f"{path} is no Parquet file of a history: {' '.join(str(error).split())}") from None


def _libraries() -> tuple[Any, Any]:
    try:
        return import_module("pyarrow"), import_module("pyarrow.parquet")
    except ImportError:
        raise DatasetError("Parquet needs pyarrow: pip install pyarrow, or use JSON lines") from None


def _tabular(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row with maps as lists of pairs, which is how a column can hold them."""
    method = row["method"]
    return {
        **row,
        "method": {
            "name": method["name"],
            "switches": sorted(method["switches"].items()),
            "stage_policy": sorted(method["stage_policy"].items()),
        },
        "software": sorted(row["software"].items()),
    }


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    method = row["method"]
    return {
        **row,
        "method": {
            "name": method["name"],
            "switches": dict(method["switches"]),
            "stage_policy": dict(method["stage_policy"]),
        },
        "software": dict(row["software"]),
    }


def _schema(pa: Any) -> Any:
    texts = pa.map_(pa.string(), pa.string())

    def struct(**fields: Any) -> Any:
        return pa.struct(list(fields.items()))

    def integers(*names: str) -> dict[str, Any]:
        return dict.fromkeys(names, pa.int64())

    def floats(*names: str) -> dict[str, Any]:
        return dict.fromkeys(names, pa.float64())

    return pa.schema(
        {
            "id": pa.string(),
            "observer": pa.string(),
            "job": pa.string(),
            "kind": pa.string(),
            "issued_at_s": pa.int64(),
            "countersigned": pa.bool_(),
            "model": struct(
                id=pa.string(),
                architecture=pa.string(),
                **integers("block_count", "hidden_size", "vocabulary_size", "max_positions", "weight_bytes"),
                **integers("intermediate_size", "head_count", "kv_head_count", "expert_count", "active_expert_count"),
            ),
            "workload": struct(
                **integers("prompt_tokens", "completion_tokens", "cached_tokens", "concurrency"),
                **floats("shared_prefix_share", "repetitiveness", "link_s"),
                objective=pa.string(),
                quality=pa.string(),
            ),
            "method": struct(name=pa.string(), switches=texts, stage_policy=texts),
            "measurements": struct(
                **floats("ttft_s", "tpot_s", "total_s", "tokens_per_s", "log_ratio_to_baseline"), **integers("replays")
            ),
            "route": pa.list_(
                struct(
                    peer=pa.string(),
                    **integers("start", "end"),
                    hardware=pa.string(),
                    **integers("steps", "rows"),
                    **floats("compute_s", "queue_s"),
                    **integers("bytes_in", "bytes_out"),
                    **floats("round_trip_s"),
                    countersigned=pa.bool_(),
                )
            ),
            "software": texts,
            "record": pa.string(),
        }
    )
