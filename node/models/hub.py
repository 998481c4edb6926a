"""Models in repositories of the Hugging Face hub, of which only the bytes that are needed are read.

The hub's own library finds files, revisions and tokens (HF_ENDPOINT, HF_TOKEN, `hf auth login`); their bytes are read
by HTTP ranges, or from that library's cache where it has the file.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit

from node.models.byte_source import ByteSource, LocalFile, read
from node.models.checkpoint import choose_weights, no_tokenizer_json, other_tokenizer
from node.models.errors import ModelError
from node.models.files import Progress, disk_errors, write_atomically
from node.models.http_file import HttpFile, Location, Retries, RetryLater, is_passing, new_client
from node.models.manifest import TOKENIZER_FILE
from node.util.text import format_size, one_line

if TYPE_CHECKING:
    import httpx

SMALL_FILES: Final = (
    "config.json", "generation_config.json", "model.safetensors.index.json", TOKENIZER_FILE, "tokenizer_config.json",
    "special_tokens_map.json", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
"""Files of a checkpoint that are downloaded whole, if they are there."""

_ID = re.compile(
    r"(?P<repository>[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95})"
    r"(?:@(?P<revision>[\w./-]{1,200}))?(?::(?P<quantisation>[\w./-]{1,200}))?(?:@(?P<late_revision>[\w./-]{1,200}))?"
)
_PAGE = re.compile(r"(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/(?P<id>[^/]+/.+?)(?:/tree/main)?/?")
"""The address of a repository's page, as browsers and other tools have it."""
_PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})", re.IGNORECASE)
_QUANTISATION = re.compile(
    r"(?:^|[-._/])((?:UD-)?(?:I?Q\d+(?:_[A-Z0-9]+)*|TQ\d_\d|MXFP\d+(?:_[A-Z0-9]+)*|NVFP\d+|B?F16|FP16|F32|FP32|F64))"
    r"(?=$|[-./])",
    re.IGNORECASE,
)
_NO_MODELS: Final = ("mmproj", "imatrix")
"""What is also published in GGUF files, beside models: projectors of images, statistics of activations."""
_SHOWN: Final = 40
_MAX_SMALL_FILE_BYTES: Final = 64 << 20
_FIRST_TRIES: Final = 3
"""Of the first request to the hub: a missing connection is reported soon."""
_LOOKUP_S: Final = 30.0


@dataclass(frozen=True, slots=True)
class HubId:
    """What `owner/repository[:quantisation][@revision]` means."""

    repository: str
    quantisation: str | None
    revision: str | None


def parse_hub_id(text: str) -> HubId | None:
    """Return what a text means as a hub repository; None when it is something else."""
    page = _PAGE.fullmatch(text)
    match = _ID.fullmatch(page["id"] if page else text)
    if match is None or (match["revision"] and match["late_revision"]):
        return None
    return HubId(match["repository"], match["quantisation"], match["revision"] or match["late_revision"])


def is_recorded_as(source: str, wanted: HubId) -> bool:
    """Return whether a user means what was imported from a commit, written `repository@commit[:file's stem]`."""
    found = parse_hub_id(source)
    if found is None or found.repository.casefold() != wanted.repository.casefold():
        return False
    if wanted.revision not in {None, found.revision}:
        return False
    if wanted.quantisation is None or found.quantisation is None:
        return wanted.quantisation == found.quantisation
    choice = GgufChoice(_quantisation(found.quantisation), found.quantisation, (), 0)
    return bool(_matching((choice,), wanted.quantisation))


@dataclass(frozen=True, slots=True)
class GgufChoice:
    """A model in a repository that is one GGUF file, or several parts: their paths, in order."""

    label: str
    """Its quantisation, as its name has it."""
    stem: str
    """Its path without suffix and part."""
    paths: tuple[str, ...]
    size_bytes: int

    @property
    def file_stem(self) -> str:
        """The file's name without folder, suffix and part."""
        return self.stem.rpartition("/")[2]


class HubRepository:
    """The files of a repository at one commit."""

    def __init__(
        self, name: str, commit: str, sizes: Mapping[str, int], client: "httpx.Client", progress: Progress
    ) -> None:
        self.name = name
        self.commit = commit
        self._sizes = sizes
        self._client = client
        self._progress = progress

    @property
    def has_only_gguf(self) -> bool:
        """Whether models are here, all of them in GGUF files."""
        return bool(self.gguf_choices()) and not any(fnmatch(path, "*.safetensors") for path in self._top_level())

    def file(self, path: str) -> ByteSource:
        """Return a file of the repository, from the hub library's cache if it is there."""
        import huggingface_hub

        size = self._sizes[path]
        cached = huggingface_hub.try_to_load_from_cache(self.name, path, revision=self.commit)
        if isinstance(cached, str) and Path(cached).stat().st_size == size:
            return LocalFile(Path(cached), size)
        locate = partial(_locate, self.name, path, self.commit)
        return HttpFile(f"{path} of {self.name}", size, locate, self._client, self._progress)

    def download(self, names: Iterable[str], folder: Path) -> None:
        """Download small files into a folder, those of the names that there are."""
        with disk_errors(f"cannot store the files of {self.name}"):
            folder.mkdir(exist_ok=True)
            for name in names:
                size = self._sizes.get(name)
                if size is None or (folder / name).exists():
                    continue
                if size > _MAX_SMALL_FILE_BYTES:
                    raise ModelError(f"{name} of {self.name} is larger than {_MAX_SMALL_FILE_BYTES >> 20} MiB")
                write_atomically(folder / name, read(self.file(name), 0, size))

    def download_checkpoint(self, folder: Path) -> Mapping[str, ByteSource]:
        """Download all of a checkpoint but its weights into a folder; return these, to be read by ranges."""
        top_level = self._top_level()
        other = other_tokenizer(top_level)
        if other is not None and TOKENIZER_FILE not in top_level:
            raise ModelError(no_tokenizer_json(self.name, other))
        self.download(SMALL_FILES, folder)
        return {name: self.file(name) for name in choose_weights(folder, top_level, self.name)}

    def _top_level(self) -> list[str]:
        return [path for path in self._sizes if "/" not in path]

    def gguf_choices(self) -> tuple[GgufChoice, ...]:
        """Return the models that the repository has in GGUF files, in the order of their sizes."""
        groups: dict[str, dict[int, str]] = {}
        counts: dict[str, int] = {}
        for path in self._sizes:
            stem, dot, suffix = path.rpartition(".")
            if not dot or suffix.lower() != "gguf" or stem.rpartition("/")[2].lower().startswith(_NO_MODELS):
                continue
            part = _PART.fullmatch(stem)
            stem, number, count = (part["stem"], int(part["number"]), int(part["count"])) if part else (stem, 1, 1)
            groups.setdefault(stem, {})[number] = path
            counts[stem] = count
        choices = [
            GgufChoice(_quantisation(stem), stem, paths, sum(map(self._sizes.__getitem__, paths)))
            for stem, parts in groups.items()
            if len(paths := tuple(path for _, path in sorted(parts.items()))) == counts[stem]
        ]
        return tuple(sorted(choices, key=lambda choice: (choice.size_bytes, choice.stem)))

    def choose_gguf(self, quantisation: str | None) -> GgufChoice:
        """Return the model of a quantisation; raise ModelError with the available ones when it is not one of them."""
        choices: Sequence[GgufChoice] = self.gguf_choices()
        if not choices:
            raise ModelError(f"{self.name} has no GGUF files: leave out :{quantisation}")
        found = _matching(choices, quantisation) if quantisation else []
        if len(found) == 1:
            return found[0]
        example = f"{self.name}:{choices[0].label or choices[0].stem}"
        if not quantisation:
            fault = f"{self.name} has its weights in GGUF files only: say which, such as {example}"
        elif found:
            fault = f"{self.name} has several files for {quantisation}: name one"
            choices = found
        else:
            fault = f"{self.name} has no quantisation {quantisation}"
        raise ModelError(f"{fault}; available: {_list_choices(choices)}")


@contextmanager
def open_repository(repository: str, revision: str | None, progress: Progress) -> Iterator[HubRepository]:
    """Ask the hub for the files of a repository at a revision, by default the main one. Raises ModelError.

    `progress` is told when a server is waited for, then and later, and may raise to give up.
    """
    # Imported here, as it is slow and most commands do not need it.
    import huggingface_hub

    retries = Retries(f"cannot list the files of {repository}", progress, limit=_FIRST_TRIES)
    while True:
        try:
            with _hub_errors(repository, revision):
                hub = huggingface_hub.HfApi()
                info = hub.model_info(repository, revision=revision, files_metadata=True, timeout=_LOOKUP_S)
                break
        except RetryLater as fault:
            retries.pause(fault)
    sizes = {file.rfilename: file.size for file in info.siblings or () if file.size is not None}
    with new_client() as client:
        yield HubRepository(repository, str(info.sha), sizes, client, progress)


def _locate(repository: str, path: str, commit: str) -> Location:
    """Return where the hub has a file: often on another host, and for some time only."""
    import huggingface_hub
    from huggingface_hub.utils._headers import build_hf_headers

    with _hub_errors(repository, commit):
        url = huggingface_hub.hf_hub_url(repository, path, revision=commit)
        location = huggingface_hub.get_hf_file_metadata(url, timeout=_LOOKUP_S).location
        # The token is for the hub alone.
        is_at_hub = urlsplit(location).netloc == urlsplit(url).netloc
        headers = build_hf_headers(token=None if is_at_hub else False)
    return Location(location, {str(key): str(value) for key, value in headers.items()})


@contextmanager
def _hub_errors(repository: str, revision: str | None) -> Iterator[None]:
    """Turn an error of the hub's library into a ModelError, or into RetryLater."""
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError:
        raise ModelError(f"{repository} is gated: accept its terms on the hub and log in there") from None
    except errors.RepositoryNotFoundError:
        raise ModelError(f"the hub has no model {repository}, or you have no access to it") from None
    except errors.RevisionNotFoundError:
        raise ModelError(f"{repository} has no revision {revision}") from None
    except errors.OfflineModeIsEnabled:
        raise ModelError(f"cannot read {repository} from the hub: HF_HUB_OFFLINE is set") from None
    except errors.HfHubHTTPError as error:
        if is_passing(error.response.status_code):
            raise RetryLater.from_headers(one_line(error), error.response.headers) from None
        raise ModelError(f"cannot read {repository} from the hub: {one_line(error)}") from error
    except ValueError as error:
        raise ModelError(f"cannot read {repository} from the hub: {one_line(error)}") from error
    except Exception as error:  # of its HTTP client
        raise RetryLater(one_line(error)) from error


def _quantisation(stem: str) -> str:
    """Return the quantisation in a path without suffix, as it is written there; empty if there is none."""
    return next(reversed(_QUANTISATION.findall(stem)), "")


def _matching(choices: Sequence[GgufChoice], quantisation: str) -> Sequence[GgufChoice]:
    """Return the choices that a user means by a quantisation or a file's name, without regard to case."""
    wanted = quantisation.casefold().removesuffix(".gguf")
    groups = [
        [choice for choice in choices if wanted == choice.label.casefold()],
        [choice for choice in choices if wanted in {it.casefold() for it in (choice.stem, choice.file_stem)}],
        [choice for choice in choices if _has_word(choice.stem, wanted)],
    ]
    return next(filter(None, groups), ())


def _has_word(stem: str, word: str) -> bool:
    return re.search(rf"(?:^|[-._/]){re.escape(word)}(?:$|[-./])", stem, re.IGNORECASE) is not None


def _list_choices(choices: Sequence[GgufChoice]) -> str:
    labels = [choice.label for choice in choices]
    shown = [
        f"{choice.label if choice.label and labels.count(choice.label) == 1 else choice.stem} "
        f"({format_size(choice.size_bytes)})"
        for choice in choices[:_SHOWN]
    ]
    more = f" and {len(choices) - _SHOWN} more" if len(choices) > _SHOWN else ""
    return ", ".join(shown) + more
