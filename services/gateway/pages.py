"""The web page and its files, kept in memory: a handful of small ones, read once at start.

A page names its files with a hash of their content (`/static/app.js?v=...`), so browsers keep those for ever, and the
pages themselves are asked for anew each time, which costs a 304.
"""

import gzip
import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from aiohttp import hdrs, web

from shared.application import Call
from shared.errors import NotFound

FOLDER = Path(__file__).parent / "static"

_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".txt": "text/plain; charset=utf-8",
}
_POLICY = (
    "default-src 'self'; img-src 'self' data: blob:; object-src 'none'; "
    "base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
)
PAGE_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "Referrer-Policy": "no-referrer",
    "X-Frame-Options": "DENY",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
}
_ALWAYS_ASK = "no-cache"
_FOR_EVER = "public, max-age=31536000, immutable"
_NAMED = re.compile(rb"(?<=[\"'(])(?:/static/|\./)([\w.-]+)(?=[\"')])")


@dataclass(frozen=True)
class Asset:
    content_type: str
    body: bytes
    zipped: bytes
    version: str

    @classmethod
    def of(cls, name: str, body: bytes) -> "Asset":
        version = hashlib.sha256(body).hexdigest()[:16]
        return cls(_TYPES[Path(name).suffix], body, gzip.compress(body, mtime=0), version)


def load(folder: Path = FOLDER) -> dict[str, Asset]:
    """The files of `folder` by name; files they name are named with their hash. Who is named is read first."""
    bodies = {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.suffix in _TYPES}
    assets: dict[str, Asset] = {}

    def finish(name: str) -> Asset:
        if name not in assets:

            def versioned(match: "re.Match[bytes]") -> bytes:
                named = match[1].decode()
                return match[0] + b"?v=" + finish(named).version.encode() if named in bodies else match[0]

            assets[name] = Asset.of(name, _NAMED.sub(versioned, bodies[name]))
        return assets[name]

    for name in bodies:
        finish(name)
    return assets


class Pages:
    def __init__(self, assets: Mapping[str, Asset]) -> None:
        self._assets = assets

    async def home(self, call: Call) -> web.StreamResponse:
        """The web page."""
        return self._answer(call, "index.html")

    async def documentation(self, call: Call) -> web.StreamResponse:
        """The API document, rendered."""
        return self._answer(call, "docs.html")

    async def asset(self, call: Call, name: str) -> web.StreamResponse:
        """A file of the pages."""
        return self._answer(call, name)

    async def icon(self, call: Call) -> web.StreamResponse:
        """For browsers that ask without having been told where it is."""
        return self._answer(call, "icon.svg")

    async def robots(self, call: Call) -> web.StreamResponse:
        """Nothing here is for search engines but the page itself."""
        return self._answer(call, "robots.txt")

    def _answer(self, call: Call, name: str) -> web.StreamResponse:
        asset = self._assets.get(name)
        if asset is None:
            raise NotFound
        zips = "gzip" in call.request.headers.get(hdrs.ACCEPT_ENCODING, "")
        tag = f'"{asset.version}{"-gz" if zips else ""}"'
        headers = {
            hdrs.ETAG: tag,
            hdrs.VARY: hdrs.ACCEPT_ENCODING,
            hdrs.CACHE_CONTROL: _FOR_EVER if call.request.query_string == f"v={asset.version}" else _ALWAYS_ASK,
            **PAGE_HEADERS,
        }
        if tag in call.request.headers.get(hdrs.IF_NONE_MATCH, ""):
            return web.Response(status=304, headers=headers)
        headers[hdrs.CONTENT_TYPE] = asset.content_type
        if zips:
            headers[hdrs.CONTENT_ENCODING] = "gzip"
        return web.Response(body=asset.zipped if zips else asset.body, headers=headers)
