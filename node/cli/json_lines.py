"""A file of JSON lines that grows by one line for each result, and from which an interrupted verb goes on."""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from node.cli.output import CommandError
from node.util.json_line import json_line


class ResultFile:
    """One such file; it need not exist yet."""

    def __init__(self, path: Path, keys: Sequence[str], writer: str) -> None:
        """`keys`: what every line has, in this order at its beginning. `writer`: the command that writes such files."""
        self.path = path
        self._keys = set(keys)
        self._begins = f'{{"{keys[0]}": '.encode()
        self._foreign = f"cannot resume from {path}: not written by `{writer}`; choose another file"

    def read(self) -> list[dict[str, Any]]:
        """Return the results so far; an incomplete last line is left out. Raises CommandError for other files."""
        if not self.path.exists():
            return []
        try:
            # As bytes: the last line may end inside a character.
            *lines, cut_off = self.path.read_bytes().split(b"\n")
            results = [json.loads(line.decode()) for line in lines if line]
        except OSError as error:
            raise CommandError(f"cannot read {self.path}: {error.strerror}") from None
        except ValueError:
            raise CommandError(self._foreign) from None
        is_ours = all(isinstance(result, dict) and self._keys <= result.keys() for result in results)
        if not is_ours or not cut_off.startswith(self._begins[: len(cut_off)]):
            raise CommandError(self._foreign)
        return results

    def check_writable(self) -> None:
        """Raise CommandError where no result could be written, before any is computed."""
        try:
            self.path.open("ab").close()
        except OSError as error:
            raise self._cannot_write(error) from None

    def append(self, result: Mapping[str, Any]) -> None:
        """Add a result, which no crash takes away again. Raises CommandError."""
        try:
            with self.path.open("a+b") as file:
                end = file.tell()
                if end:
                    file.seek(end - 1)
                    if file.read(1) != b"\n":  # drop an incomplete line
                        file.seek(0)
                        file.truncate(file.read().rfind(b"\n") + 1)
                file.write(_line(result))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise self._cannot_write(error) from None

    def rewrite(self, results: Iterable[Mapping[str, Any]]) -> None:
        """Replace the file by one with these results, whole or not at all. Raises CommandError."""
        temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        try:
            with temporary.open("wb") as file:
                file.writelines(map(_line, results))
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(self.path)
        except OSError as error:
            raise self._cannot_write(error) from None
        finally:
            temporary.unlink(missing_ok=True)

    def _cannot_write(self, error: OSError) -> CommandError:
        return CommandError(f"cannot write {self.path}: {error.strerror}")


def _line(result: Mapping[str, Any]) -> bytes:
    return f"{json_line(result)}\n".encode(errors="replace")
