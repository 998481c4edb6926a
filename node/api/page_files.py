"""The page at `/`: the files of the folder `page`, as they are. They hold no secrets, so that they need no API key."""

import hashlib
from collections.abc import Mapping
from importlib.resources import files
from typing import Final, NamedTuple

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from node.api.errors import ApiError

MEDIA_TYPES: Final = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}

HEADERS: Final = {
    # Nothing from elsewhere and nothing inline: text from models and peers cannot run as script (XSS).
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-cache",
}


class _File(NamedTuple):
    body: bytes
    media_type: str
    etag: str


def is_page(path: str) -> bool:
    """Return whether a path is the page or one of its files."""
    return path == "/" or path.startswith("/page/")


class PageFiles:
    """Serves the page."""

    def __init__(self) -> None:
        self._files = _read_files()

    def routes(self) -> list[Route]:
        """Return the routes of the page."""
        return [Route("/", self._index, methods=["GET"]), Route("/page/{file}", self._file, methods=["GET"])]

    async def _index(self, request: Request) -> Response:
        return self._answer(request, "index.html")

    async def _file(self, request: Request) -> Response:
        return self._answer(request, request.path_params["file"])

    def _answer(self, request: Request, name: str) -> Response:
        file = self._files.get(name)
        if file is None:
            raise ApiError(404, f"the page has no file {name!r}")
        headers = {**HEADERS, "ETag": file.etag}
        if request.headers.get("if-none-match") == file.etag:
            return Response(status_code=304, headers=headers)
        return Response(file.body, media_type=file.media_type, headers=headers)


def _read_files() -> Mapping[str, _File]:
    found: dict[str, _File] = {}
    for each in files("node.api").joinpath("page").iterdir():
        suffix = each.name[each.name.rfind(".") :]
        if suffix in MEDIA_TYPES:
            body = each.read_bytes()
            etag = f'"{hashlib.sha256(body).hexdigest()[:32]}"'
            found[each.name] = _File(body, MEDIA_TYPES[suffix], etag)
    return found
