"""The heads of answers that the gateway writes itself, in one piece with what comes after them."""

from collections.abc import Mapping
from email.utils import formatdate
from functools import lru_cache
from http import HTTPStatus

import msgspec

from services.gateway import security
from services.gateway.cors import Cors
from shared.errors import TenfoldError
from shared.middleware import PROBLEM_JSON

_PHRASES = {status.value: status.phrase.encode() for status in HTTPStatus}


class Common:
    """What every answer says, by the configuration: `lines` of one to a caller."""

    def __init__(self, cors: Cors) -> None:
        self._of_others = lines(cors.headers(None))
        self._of_origins: dict[str | None, bytes] = {origin: lines(cors.headers(origin)) for origin in cors.origins}

    def lines(self, seen: int, request_id: str, scheme: str, origin: str | None) -> bytes:
        of_origin = self._of_origins.get(origin, self._of_others)
        return b"X-Request-Id: %b\r\nX-Content-Type-Options: nosniff\r\n%b%b" % (
            request_id.encode(), security.lines(seen, scheme), of_origin,
        )  # fmt: skip


def lines(headers: Mapping[str, str]) -> bytes:
    return "".join(f"{name}: {value}\r\n" for name, value in headers.items()).encode("utf-8", "surrogateescape")


@lru_cache(maxsize=256)
def first_line(status: int, reason: bytes | None = None) -> bytes:
    return b"HTTP/1.1 %d %b\r\n" % (status, _PHRASES.get(status, b"") if reason is None else reason)


def date() -> bytes:
    return b"Date: %b\r\n" % formatdate(usegmt=True).encode()


def problem(error: TenfoldError) -> tuple[bytes, bytes]:
    """Status line and header lines of a problem, and its body."""
    found = error.problem()
    body = msgspec.json.encode(found)
    headers = {
        "Content-Type": PROBLEM_JSON,
        "Content-Length": str(len(body)),
        "Cache-Control": "no-store",
        **error.headers,
    }
    return first_line(found.status) + date() + lines(headers), body
