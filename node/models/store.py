"""The packages in the user's cache folder, shared by all processes of the user.

    models/<model id>/manifest.json, block-000.safetensors, …   a package; only some of its files may be there
    models/<model id>/.verified.jsonl                           which of them were hashed, and their stamps then
    staging/<random>/                                           an import under way
    staging/<digest of a source>/                               an import that can be continued
    names.json                                                  names that the user gave to models
    graphs/<model id>-…/, quality/<model id>.json               what was built and measured of a model
    sources.json                                                the models that hub repositories and local files gave

A file under its own name is whole: it was written elsewhere, verified, flushed and renamed. Other leftovers of a crash
are deleted by the next import.

`node.models.eviction` deletes files that were fetched from peers; imported models are never evicted.
"""

import hashlib
import json
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from node.config import default_cache_dir
from node.models.catalogue import CATALOGUE
from node.models.errors import ContentError, ModelError, SourceError
from node.models.files import (
    Progress,
    disk_errors,
    flush_directory,
    ignore_progress,
    is_unused,
    lock_file,
    part_of,
    size_of,
    write_atomically,
)
from node.models.id_prefix import ID_PREFIX, PEER_ID_DIGITS, meant_by
from node.models.manifest import MANIFEST_FILE, FileEntry, Manifest, parse_manifest
from node.models.verification_record import FileStamp, VerificationRecord
from node.util.disk_cache import FolderCache, folder_bytes
from node.util.paths import expand
from node.util.suggestions import did_you_mean
from protocol.identity import BlockRange, ModelId, parse_model_id

FETCHED_MARK = ".fetched"
"""In a package that was begun with a peer's manifest: its files can be fetched again, and may be evicted."""

JOURNAL_FILE = "parts.json"
"""In the staging folder of an import that can be continued: its finished files."""

GRAPHS_FOLDER = "graphs"
"""Of the cache folder: folders that engines build of a model, by names that begin with its id."""
QUALITY_FOLDER = "quality"
"""Of the cache folder: files of measured quality, by the model's id."""

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")


class UnknownModelError(ModelError):
    """No model has that name or id."""


class DamagedModelError(ModelError):
    """The manifest of the model is not what its id says."""


class AmbiguousModelError(ModelError):
    """The name or id prefix matches several models."""


class ModelInUseError(ModelError):
    """A process serves the model's blocks, or fetches its files."""


def check_name(name: str) -> None:
    """Raise ModelError for an invalid name."""
    if _NAME.fullmatch(name) is None or ID_PREFIX.fullmatch(name):
        raise ModelError(
            f"{name[:80]!r} cannot be a model's name: expected at most 64 lower-case letters, digits, '.', '_' and "
            "'-', and not the look of an id"
        )


@dataclass(frozen=True, slots=True)
class Package:
    """A model package in the cache, whole or in part."""

    manifest: Manifest
    path: Path

    @property
    def model_id(self) -> ModelId:
        """The model's id."""
        return self.manifest.model_id

    def path_of(self, file: FileEntry) -> Path:
        """Return where a file of the package is or would be."""
        return self.path / file.name

    def has(self, file: FileEntry) -> bool:
        """Return whether a file is there. Its content was verified before it got its name."""
        with disk_errors(f"cannot look for {file.name} of model {self.model_id[:12]}"):
            return size_of(self.path_of(file)) == file.size_bytes

    def missing(self, blocks: BlockRange | None = None) -> tuple[FileEntry, ...]:
        """Return which weight files of a span, or which files of the whole package, are not there."""
        wanted = self.manifest.files if blocks is None else self.manifest.files_for(blocks)
        return tuple(file for file in wanted if not self.has(file))

    def present(self) -> frozenset[str]:
        """Return the names of the weight files that are there."""
        return frozenset(file.name for file in self.manifest.weight_files if self.has(file))

    def is_in_use(self) -> bool:
        """Return whether a process serves some of the blocks, or fetches files. Raises OSError."""
        paths = [self.path_of(file) for file in self.manifest.files]
        return not all(map(is_unused, [*paths, *map(part_of, paths)]))

    def serves(self, blocks: BlockRange | None) -> bool:
        """Return whether everything that a span or the whole model needs is there, the tokenizer included."""
        return not self.missing(blocks) and all(map(self.has, self.manifest.tokenizer_files))


@dataclass(frozen=True, slots=True)
class PackageCheck:
    """The result of checking a package's files by their hashes."""

    checked: tuple[str, ...]
    missing: tuple[str, ...]
    corrupt: tuple[str, ...]


class ModelStore:
    """The model packages in one cache folder. Every method may be called from any thread."""

    def __init__(self, cache_dir: Path | None = None) -> None:
        if cache_dir is None:
            configured = os.environ.get("METASWARM_CACHE_DIR")
            cache_dir = expand(configured) if configured else default_cache_dir()
        self.cache_dir = cache_dir
        self._models = cache_dir / "models"
        self._staging = cache_dir / "staging"
        self._names = cache_dir / "names.json"
        self._lock = threading.Lock()
        self._manifests: dict[ModelId, Manifest] = {}
        self._by_sha256: dict[str, set[Path]] = {}

    def list(self) -> tuple[Package, ...]:
        """Return every package whose manifest is sound, whole or in part, in the order of their ids."""
        return self.list_all()[0]

    def list_all(self) -> tuple[tuple[Package, ...], Mapping[ModelId, ModelError]]:
        """Return every package whose manifest is sound, and what is wrong with the other folders of models."""
        packages, faults = [], dict[ModelId, ModelError]()
        for model in self._stored_ids():
            try:
                packages.append(self.get(model))
            except ModelError as error:
                faults[model] = error
        return tuple(packages), faults

    def size_bytes(self, model: ModelId) -> int:
        """Return how much a model takes in the cache, also a damaged one."""
        return folder_bytes(self._models / model)

    def get(self, model: ModelId) -> Package:
        """Return a package. Raises UnknownModelError when there is none, ModelError when its manifest is damaged."""
        path = self._models / model
        with disk_errors(f"cannot look for model {model[:12]}"):
            is_here = (path / MANIFEST_FILE).exists()
        if not is_here:
            raise UnknownModelError(f"model {model[:12]} is not in {self.cache_dir}: import it first")
        manifest = self._manifests.get(model)
        return Package(self._load(model) if manifest is None else manifest, path)

    def find(self, model: ModelId) -> Package | None:
        """Return a package, or None when there is none, or no sound manifest of it, which may be fetched again."""
        with suppress(UnknownModelError, DamagedModelError):
            return self.get(model)
        return None

    def path_by_sha256(self, sha256: str) -> Path | None:
        """Return the file with that content, a manifest included, if some package has it."""
        if sha256 not in self._by_sha256:
            for model in self._stored_ids():
                if model not in self._manifests:
                    with suppress(ModelError):  # damaged
                        self._load(model)
        return next((path for path in sorted(self._by_sha256.get(sha256, ())) if path.exists()), None)

    def file_hashes(self) -> tuple[str, ...]:
        """Return the sha256 of every file that is here, manifests first: their models' ids."""
        packages = self.list()
        manifests = (package.model_id for package in packages)
        files = (
            file.sha256
            for package in packages
            for file in (*package.manifest.tokenizer_files, *package.manifest.weight_files)
            if package.has(file)
        )
        return tuple(dict.fromkeys([*manifests, *files]))

    def resolve(self, text: str, known: Collection[ModelId] = ()) -> ModelId:
        """Return the model that an id's prefix, a catalogue name or a local name means.

        `known`: ids from elsewhere, such as those that peers serve, which they could make up: they count where no other
        id fits, by 16 digits or more. The model need not be in the cache. Raises UnknownModelError and
        AmbiguousModelError.
        """
        names = self.names()
        matches = {names[text]} if text in names else set()
        if text in CATALOGUE:
            matches.add(CATALOGUE[text].model_id)
        ids = {*self._stored_ids(), *names.values(), *(entry.model_id for entry in CATALOGUE.values())}
        matches |= {ModelId(text)} if _is_id(text) else meant_by(text, ids, known)
        if len(matches) == 1:
            return matches.pop()
        if matches:
            raise AmbiguousModelError(f"{text!r} matches several models ({_some(matches)}): give more digits of the id")
        if ID_PREFIX.fullmatch(text) and (begun := [model for model in known if model.startswith(text)]):
            raise UnknownModelError(
                f"only peers have a model {text!r} ({_some(begun)}): give {PEER_ID_DIGITS} digits or more of its id"
            )
        known_names = sorted({*names, *CATALOGUE})
        expected = (
            f"expected an id's prefix of at least 8 hexadecimal digits, or one of {', '.join(known_names)}; "
            "`metaswarm model import OWNER/NAME` imports others"
        )
        raise UnknownModelError(f"there is no model {text[:80]!r}{did_you_mean(text, known_names) or f': {expected}'}")

    def names(self) -> Mapping[str, ModelId]:
        """Return the names that the user gave to models."""
        with disk_errors("cannot read the names of models"):
            try:
                data = self._names.read_bytes()
            except FileNotFoundError:
                return {}
        try:
            names = json.loads(data)
            return {str(name): parse_model_id(str(model)) for name, model in names.items()}
        except (ValueError, AttributeError):
            raise ModelError(f"{self._names} is damaged: delete it, and name your models again") from None

    def name_of(self, model: ModelId) -> str:
        """Return a display name: the catalogue name, else a local name, else the beginning of the id."""
        catalogued = (entry.name for entry in CATALOGUE.values() if entry.model_id == model)
        given = (name for name, named in sorted(self.names().items()) if named == model)
        return next(catalogued, None) or next(given, None) or model[:PEER_ID_DIGITS]

    def set_name(self, name: str, model: ModelId) -> None:
        """Give a model a name. Raises ModelError for a name that is malformed or means another model."""
        check_name(name)
        with self._changing(f"cannot name model {model[:12]}"):
            names = dict(self.names())
            taken = CATALOGUE[name].model_id if name in CATALOGUE else names.get(name, model)
            if taken != model:
                raise ModelError(f"{name!r} already means model {taken[:12]}: choose another name with --name")
            self._write_names({**names, name: model})

    def add_manifest(self, manifest: Manifest) -> Package:
        """Begin a package, whose files come later and one by one, or repair its manifest; idempotent."""
        path = self._models / manifest.model_id
        with self._changing(f"cannot store model {manifest.model_id[:12]}"):
            if self.find(manifest.model_id) is None:
                path.mkdir(parents=True, exist_ok=True)
                if not (path / MANIFEST_FILE).exists():
                    (path / FETCHED_MARK).touch()
                write_atomically(path / MANIFEST_FILE, manifest.data)
                flush_directory(self._models)
        return self.get(manifest.model_id)

    @contextmanager
    def staging(self, progress: Progress = ignore_progress, *, resume: str = "") -> Iterator[Path]:
        """Hold the only import into this cache, in an empty folder that is deleted at the end; see `adopt`.

        Waits while another process imports; `progress` is called meanwhile and may raise to give up. `resume`: of which
        source the import can be continued; its folder stays after an interruption until another import begins, and
        after a failure, too, once a file is finished, unless the source proved to be another model.
        """
        keep = hashlib.sha256(resume.encode()).hexdigest()[:32] if resume else ""
        with disk_errors(f"cannot write to {self.cache_dir}"):
            self._staging.mkdir(parents=True, exist_ok=True)
            with lock_file(self._staging / ".lock", lambda: progress("waiting for another import", 0, 0)):
                for leftover in self._staging.iterdir():
                    if leftover.is_dir() and leftover.name != keep:
                        shutil.rmtree(leftover)
                folder = self._staging / keep if keep else Path(tempfile.mkdtemp(dir=self._staging))
                folder.mkdir(exist_ok=True)
                is_kept = False
                try:
                    yield folder
                except (ModelError, OSError) as error:
                    has_files = (folder / JOURNAL_FILE).exists() and not isinstance(error, ContentError)
                    is_kept = bool(keep) and (has_files or isinstance(error, SourceError))
                    raise
                except BaseException:  # cancelled
                    is_kept = bool(keep)
                    raise
                finally:
                    if not is_kept:
                        shutil.rmtree(folder, ignore_errors=True)

    def adopt(self, folder: Path, manifest: Manifest) -> Package:
        """Make a package of a staging folder that holds the manifest's files, or some, written and flushed.

        Where the package exists already, these files are replaced one by one, which repairs them.
        """
        path = self._models / manifest.model_id
        with self._changing(f"cannot store model {manifest.model_id[:12]}"):
            # They were hashed as they were written.
            written = [file.name for file in manifest.files if (folder / file.name).exists()]
            stamps = {name: FileStamp.of(folder / name) for name in written}
            write_atomically(folder / MANIFEST_FILE, manifest.data)
            self._models.mkdir(parents=True, exist_ok=True)
            if path.exists():
                for name in (MANIFEST_FILE, *written):
                    (folder / name).replace(path / name)
                (path / FETCHED_MARK).unlink(missing_ok=True)
                flush_directory(path)
            else:
                folder.replace(path)
            VerificationRecord(path).add(stamps)
            flush_directory(self._models)
        return self.get(manifest.model_id)

    def verify(
        self,
        model: ModelId,
        blocks: BlockRange | None = None,
        progress: Progress = ignore_progress,
        *,
        rehash: bool = True,
    ) -> PackageCheck:
        """Hash the weight files of a span, or every file of the package; return which are missing or damaged.

        Without `rehash` only those that are new or have changed since they were last found right.
        """
        package = self.get(model)
        missing = package.missing(blocks)
        wanted = package.manifest.files if blocks is None else package.manifest.files_for(blocks)
        present = [file for file in wanted if file not in missing]
        with disk_errors(f"cannot verify model {model[:12]}"):
            corrupt = VerificationRecord(package.path).find_corrupt(present, progress, rehash=rehash)
        return PackageCheck(
            checked=tuple(file.name for file in present),
            missing=tuple(file.name for file in missing),
            corrupt=tuple(file.name for file in present if file.name in corrupt),
        )

    def discard(self, model: ModelId, name: str) -> None:
        """Delete a damaged file of a package, so that it counts as missing."""
        package = self.get(model)
        with disk_errors(f"cannot delete {name} of model {model[:12]}"):
            for file in package.manifest.files:
                if file.name == name:
                    package.path_of(file).unlink(missing_ok=True)

    def remove(self, model: ModelId, *, force: bool = False) -> int:
        """Delete a package and its local names, also a damaged one, and what was built of it; return the bytes freed.

        Raises UnknownModelError when there is none, and, unless by `force`, ModelInUseError when a process uses it.
        """
        path = self._models / model
        with self._changing(f"cannot remove model {model[:12]}"):
            if not path.exists():
                raise UnknownModelError(f"model {model[:12]} is not in {self.cache_dir}")
            package = None if force else self.find(model)
            if package is not None and package.is_in_use():
                raise ModelInUseError(f"a process on this machine serves or fetches model {model[:12]}")
            self._staging.mkdir(parents=True, exist_ok=True)
            grave = Path(tempfile.mkdtemp(dir=self._staging)) / model
            path.replace(grave)
            freed = folder_bytes(grave)
            names = self.names()
            if model in names.values():
                self._write_names({name: other for name, other in names.items() if other != model})
            shutil.rmtree(grave.parent, ignore_errors=True)  # an import may delete it at the same time
            (self.cache_dir / QUALITY_FOLDER / f"{model}.json").unlink(missing_ok=True)
            return freed + FolderCache(self.cache_dir / GRAPHS_FOLDER).drop_unused(f"{model}-")

    @contextmanager
    def _changing(self, failure: str) -> Iterator[None]:
        """Hold the cache's lock for a short change; `failure` begins the line for the user if the disk fails."""
        with disk_errors(failure):
            self.cache_dir.mkdir(parents=True, exist_ok=True)
            with lock_file(self.cache_dir / ".lock"):
                yield

    def _write_names(self, names: Mapping[str, ModelId]) -> None:
        write_atomically(self._names, json.dumps(names, indent=2, sort_keys=True).encode() + b"\n")

    def _stored_ids(self) -> tuple[ModelId, ...]:
        with disk_errors(f"cannot list the models in {self.cache_dir}"):
            try:
                names = sorted(path.name for path in self._models.iterdir())
            except FileNotFoundError:
                return ()
        return tuple(ModelId(name) for name in names if _is_id(name))

    def _load(self, model: ModelId) -> Manifest:
        path = self._models / model
        with disk_errors(f"cannot read model {model[:12]}"):
            data = (path / MANIFEST_FILE).read_bytes()
        try:
            manifest = parse_manifest(data)
        except ModelError:
            manifest = None
        if manifest is None or manifest.model_id != model:
            raise DamagedModelError(
                f"the manifest of model {model[:12]} is damaged: remove the model, and import it again"
            )
        with self._lock:
            self._manifests[model] = manifest
            self._by_sha256.setdefault(model, set()).add(path / MANIFEST_FILE)
            for file in manifest.files:
                self._by_sha256.setdefault(file.sha256, set()).add(path / file.name)
        return manifest


def _is_id(text: str) -> bool:
    return len(text) == 64 and ID_PREFIX.fullmatch(text) is not None


def _some(models: Iterable[ModelId]) -> str:
    return ", ".join(sorted(model[:PEER_ID_DIGITS] for model in models)[:4])
