"""The heads of answers that the gateway writes itself, in one piece with what comes after them."""

from collections.abc import Callable, Mapping
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
        self._cors = cors
        self._lines: Callable[[int, str, str | None], bytes] = lru_cache(maxsize=256)(self._of)

    def lines(self, seen: int, request_id: str, scheme: str, origin: str | None) -> bytes:
        known = origin if origin in self._cors.origins else None
        return b"X-Request-Id: %b\r\n%b" % (request_id.encode(), self._lines(seen & security.GIVEN, scheme, known))

    def _of(self, given: int, scheme: str, origin: str | None) -> bytes:
        own = dict(header for bit, header in security.headers(scheme).items() if not given & bit)
        return lines({"X-Content-Type-Options": "nosniff", **own, **self._cors.headers(origin)})


def lines(headers: Mapping[str, str]) -> bytes:
    return "".join(f"{name}: {value}\r\n" for name, value in headers.items()).encode("utf-8", "surrogateescape")


@lru_cache(maxsize=256)
def first_line(status: int) -> bytes:
    return b"HTTP/1.1 %d %b\r\n" % (status, _PHRASES.get(status, b""))


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
