import base64
import json
import os
import sqlite3
import time
from pathlib import Path
from typing import Any

import pytest
import trio

from node.cli import run
from node.storage.database import open_database
from node.storage.dataset import MAX_LINE_BYTES, to_row
from node.storage.history import HistoryStore
from protocol.observations import SignedObservation
from tests.support.observations import signed

NOW_S = int(time.time())
RECORDS = [signed(n, observer=n % 3, issued_at_s=NOW_S - 1800 * n, stages=(1, 2) if n % 2 else ()) for n in range(8)]


def fill(data_dir: Path, records: list[SignedObservation]) -> None:
    async def add() -> None:
        async with open_database(data_dir / "metaswarm.sqlite3") as database:
            await HistoryStore(database).add_many(records)

    trio.run(add)


def held(data_dir: Path) -> set[bytes]:
    async def read() -> set[bytes]:
        async with open_database(data_dir / "metaswarm.sqlite3") as database:
            return {stored.envelope async for page in HistoryStore(database).pages() for stored in page}

    return trio.run(read)


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    """Give the data directory of a node with a history."""
    fill(tmp_path / "node", RECORDS)
    return tmp_path / "node"


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """Give a dataset with the same history."""
    file = tmp_path / "given.jsonl"
    file.write_text("".join(json.dumps(to_row(record)) + "\n" for record in RECORDS), encoding="utf-8")
    return file


def history(verb: str, data_dir: Path, *arguments: Any) -> int:
    return run(["history", verb, "--data-dir", str(data_dir), *map(str, arguments)])


def test_export_prints_json_lines(data_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert history("export", data_dir) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {row["id"]: row for row in rows} == {record.id.hex(): to_row(record) for record in RECORDS}
    assert rows[0]["method"]["name"] == "arithmetic=fp32|speculation=off"


def test_export_refuses_a_parquet_file(data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert history("export", data_dir, "--output", tmp_path / "x.parquet") == 2
    assert "JSON lines, not Parquet" in capsys.readouterr().err


def test_data_dir_from_environment(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("METASWARM_DATA_DIR", str(data_dir))
    assert run(["history", "export"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(RECORDS)


def test_import_reads_export(data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, other = tmp_path / "history.jsonl", tmp_path / "other"
    assert history("export", data_dir, "--output", file, "--json") == 0
    assert json.loads(capsys.readouterr().out) == {"exported": len(RECORDS), "file": str(file)}
    fill(other, RECORDS[:3])
    assert history("import", other, file, "--json") == 0
    assert json.loads(capsys.readouterr().out) == {"read": 8, "new": 5, "known": 3, "rejected": []}
    assert held(other) == held(data_dir)
    assert history("import", other, file) == 0
    assert capsys.readouterr().out == "read 8 observations: 0 new, 8 known already, 0 rejected\n"


def test_import_rejects_bad_lines_only(tmp_path: Path, dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = dataset.read_text().splitlines()
    edited = json.loads(lines[1])
    edited["measurements"]["total_s"] /= 2
    forged = json.loads(lines[2])
    envelope = RECORDS[2].envelope
    forged["record"] = base64.b64encode(envelope[:-1] + bytes([envelope[-1] ^ 1])).decode()
    old = to_row(signed(99, issued_at_s=NOW_S - 40 * 86400))
    bad = ["{", "[1]", "{}", json.dumps(edited), json.dumps(forged), json.dumps(old), "x" * 3 * MAX_LINE_BYTES]
    file = tmp_path / "mixed.jsonl"
    file.write_text("\n".join([lines[0], *bad, "", lines[3]]), encoding="utf-8")
    assert history("import", tmp_path / "new", file, "--json") == 1
    answer = capsys.readouterr()
    result = json.loads(answer.out)
    assert (result["read"], result["new"]) == (9, 2)
    assert [entry["line"] for entry in result["rejected"]] == [2, 3, 4, 5, 6, 7, 8]
    reasons = [entry["reason"] for entry in result["rejected"]]
    for reason, expected in zip(
        reasons,
        [
            "not valid JSON",
            "not a JSON object",
            "'record'",
            "'measurements' differs",
            "signature",
            "too old",
            "at most",
        ],
        strict=True,
    ):
        assert expected in reason
    assert f"metaswarm: {file}, line 5: the field 'measurements' differs from the signed record\n" in answer.err
    assert held(tmp_path / "new") == {RECORDS[0].envelope, RECORDS[3].envelope}


def test_verify_valid_history(data_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert history("verify", data_dir, "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["observations"], result["countersigned"], result["faults"]) == (8, 8, [])
    assert history("verify", data_dir) == 0
    assert result["digest"] in capsys.readouterr().out


def test_verify_finds_and_repairs_tampered_rows(data_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    connection = sqlite3.connect(data_dir / "metaswarm.sqlite3")
    other = RECORDS[5].envelope
    with connection:
        connection.execute("UPDATE observations SET envelope = ? WHERE id = ?", (b"garbage", RECORDS[0].id))
        connection.execute("UPDATE observations SET envelope = ? WHERE id = ?", (other, RECORDS[1].id))
    connection.close()
    assert history("verify", data_dir, "--json") == 1
    answer = capsys.readouterr()
    faults = {fault["id"]: fault["reason"] for fault in json.loads(answer.out)["faults"]}
    assert faults.keys() == {RECORDS[0].id.hex(), RECORDS[1].id.hex()}
    assert "another id" in faults[RECORDS[1].id.hex()]
    assert f"observation {RECORDS[0].id.hex()[:16]}…" in answer.err
    assert history("export", data_dir) == 1
    assert "metaswarm history verify" in capsys.readouterr().err
    assert history("verify", data_dir, "--repair") == 0
    assert history("verify", data_dir) == 0
    assert held(data_dir) == {record.envelope for record in RECORDS[2:]}


def test_verify_finds_wrong_digests(data_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    connection = sqlite3.connect(data_dir / "metaswarm.sqlite3")
    with connection:
        connection.execute("UPDATE buckets SET count = count + 1 WHERE bucket = ?", (RECORDS[0].bucket,))
    connection.close()
    assert history("verify", data_dir) == 1
    assert "does not match" in capsys.readouterr().err


def test_error_names_directory_without_history(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for verb in ("export", "verify"):
        assert history(verb, tmp_path / "nobody") == 1
        assert capsys.readouterr().err.startswith(f"metaswarm: no history in {tmp_path / 'nobody'}")
    assert not (tmp_path / "nobody").exists()


def test_leaves_damaged_database_alone(data_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = data_dir / "metaswarm.sqlite3"
    file.write_bytes(file.read_bytes()[:10_000])
    assert history("export", data_dir) == 1
    assert "is damaged" in capsys.readouterr().err
    assert file.stat().st_size == 10_000


def test_failed_export_leaves_no_file(data_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = data_dir / "missing" / "history.jsonl"
    assert history("export", data_dir, "--output", output) == 1
    assert "No such file" in capsys.readouterr().err
    connection = sqlite3.connect(data_dir / "metaswarm.sqlite3")
    with connection:
        connection.execute("UPDATE observations SET envelope = x'78'")
    connection.close()
    assert history("export", data_dir, "--output", data_dir / "history.jsonl") == 1
    assert not list(data_dir.glob("*history.jsonl*"))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_export_to_full_disk_names_the_file(data_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (data_dir / f".history.jsonl.{os.getpid()}").symlink_to("/dev/full")
    assert history("export", data_dir, "--output", data_dir / "history.jsonl") == 1
    assert f"cannot use {data_dir / 'history.jsonl'}: No space left" in capsys.readouterr().err


@pytest.mark.parametrize("lines", [3, 500])
def test_import_of_another_file_is_one_error(tmp_path: Path, lines: int, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "passwd"
    file.write_text("root:x:0:0:root:/root:/bin/bash\n" * lines)
    assert history("import", tmp_path / "new", file) == 1
    answer = capsys.readouterr()
    assert answer.out == ""
    assert answer.err.splitlines()[1:] == [  # after the progress
        f"metaswarm: {file} has no observation: FILE is JSON lines from `metaswarm history export`"
    ]


def test_export_to_an_argument_names_the_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["history", "export", "history.jsonl"]) == 2
    assert "a file to write is given as --output FILE" in capsys.readouterr().err
