"""What may pass the door: checks on a request's head, and the headers that go on to services and back to callers.

Header lines are bytes without their line ends, as they came: nothing is decoded that need not be read. None can hold a
line break, for aiohttp's parser lets none in, nor do httptools and `ODD` in answers.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from typing import Generic, NamedTuple, TypeVar
from urllib.parse import unquote_to_bytes

import msgspec
from aiohttp import hdrs
from multidict import CIMultiDict, CIMultiDictProxy

from services.gateway.errors import AmbiguousRequest
from shared import consistency, http_client, tracing
from shared.errors import Malformed, TenfoldError
from shared.middleware import REQUEST_ID, sensible_id, time_allowed

V = TypeVar("V")

RawHeaders = Sequence[tuple[bytes, bytes]]
Headers = CIMultiDict[str] | CIMultiDictProxy[str]

HOP_BY_HOP = frozenset(
    {
        b"connection",
        b"keep-alive",
        b"proxy-authenticate",
        b"proxy-authorization",
        b"proxy-authentication-info",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
    }
)
# Only we say who calls and from where; `Host` and `Expect` are between the caller and us; how long a body is depends on
# whether there is one.
_OURS = frozenset(
    {
        b"host",
        b"expect",
        b"content-length",
        b"forwarded",
        b"via",
        b"x-real-ip",
        b"x-client-ip",
        b"x-cluster-client-ip",
        b"true-client-ip",
        b"cf-connecting-ip",
        b"x-original-url",
        b"x-rewrite-url",
        b"x-http-method-override",
        b"x-request-id",
        b"request-timeout",
        b"traceparent",
        b"tracestate",
        b"baggage",
    }
)
_OURS_PREFIXES = (b"x-forwarded-", b"x-user", b"x-principal", b"x-auth", b"x-role", b"x-tenfold-", b"x-envoy-")
# What we say ourselves in every answer.
_NOT_BACK = frozenset(
    {
        b"server",
        b"x-powered-by",
        b"x-request-id",
        b"x-content-type-options",
        b"ratelimit",
        b"ratelimit-policy",
        b"access-control-allow-origin",
        b"access-control-expose-headers",
    }
)

# How an answer is to be read, beside its length.
_FRAMING = frozenset({b"transfer-encoding", b"upgrade", b"connection", b"proxy-connection"})
# Lines that hardly ever come again, or that are nobody's to keep.
_ONCE = frozenset(
    {b"x-request-id", b"consistency-token", b"etag", b"last-modified", b"location", b"content-range", b"set-cookie"}
)
# What does not become the hop's own by being named in `Connection`, or is so anyway.
_NOT_NAMED = HOP_BY_HOP | {b"close", b"content-length", b""}

COOKIE = "tenfold_consistency"
_COOKIE = re.compile(rf'(?:^|;)[ \t]*{COOKIE}="?([0-9a-z.-]{{1,256}})"?[ \t]*(?:;|$)')
_COOKIE_SECONDS = 60
_TOKEN = re.compile(rb"[0-9a-z.-]{1,256}")
_DOTS = re.compile(rb"(?:^|[/\\])\.{1,2}(?:[/\\]|$)")
_CONNECTION_LENGTH = len("connection")
_CONTROL = re.compile(rb"[\x00-\x1f\x7f]")
_NAME = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_VISIBLE = bytes({*range(0x20, 0x7F), *range(0x80, 0x100)})


class Seen:
    """Headers of an answer that something depends on, as bits; plain numbers, for an `IntFlag` costs more than all."""

    DATE = 1
    CONTENT_SECURITY_POLICY = 2
    REFERRER_POLICY = 4
    STRICT_TRANSPORT_SECURITY = 8
    CONTENT_LENGTH = 16
    CONTENT_TYPE = 32
    CONSISTENCY_TOKEN = 64
    CONNECTION = 128  # more than `keep-alive`


_SEEN = {name.lower().replace("_", "-").encode(): bit for name, bit in vars(Seen).items() if name.isupper()}
ODD = 256  # beside those of `Seen`: how the answer is to be read is for a parser to say


class _Known(dict[bytes, V], Generic[V]):
    """Bounded, for there is no end of what others make up."""

    _MOST = 1000
    _LONGEST = 64

    def keep(self, key: bytes, verdict: V) -> V:
        if len(key) <= self._LONGEST:
            if len(self) >= self._MOST:
                self.clear()
            self[key] = verdict
        return verdict


class Verdicts(_Known[V]):
    """What becomes of something by its name, found out once for every spelling."""

    def __init__(self, judge: Callable[[bytes], V]) -> None:
        self._judge = judge

    def __missing__(self, name: bytes) -> V:
        return self.keep(name, self._judge(name))


def _passes(name: bytes) -> bool:
    name = name.lower()
    # `X_User_Id` reads as `X-User-Id` to some servers.
    return not (name in HOP_BY_HOP or name in _OURS or b"_" in name or name.startswith(_OURS_PREFIXES))


def _back(name: bytes) -> tuple[bool, int, bool]:
    """Whether it passes, what it is, if anything depends on it, and whether the same line may come again."""
    known = name.lower()
    seen = _SEEN.get(known, 0)
    if known in _FRAMING or not _NAME.fullmatch(name):
        seen |= ODD
    return not (known in HOP_BY_HOP or known in _NOT_BACK), seen, known not in _ONCE


def _line_back(line: bytes) -> tuple[bool, int]:
    """The same of a line."""
    name, colon, value = line.partition(b": ")
    passes, seen, again = _BACK[name]
    if seen & Seen.CONNECTION and value.lower() == b"keep-alive":
        seen = 0
    if not colon or value.startswith(b" ") or line.translate(None, _VISIBLE):
        seen |= ODD
    return _LINES.keep(line, (passes, seen)) if again else (passes, seen)


_PASSES = Verdicts(_passes)
_BACK = Verdicts(_back)
_LINES: _Known[tuple[bool, int]] = _Known()


class Client(NamedTuple):
    """Who is on the other side, as far as the proxies before us can be trusted."""

    address: str
    scheme: str
    host: str


class Head(msgspec.Struct, frozen=True, eq=False):
    """What the headers of a request say. Callers mostly say the same again, so a connection remembers its last one."""

    raw: RawHeaders
    client: Client
    above: str  # the caller's `traceparent`, if it is one
    request_id: str | None  # if it is sensible
    origin: str | None
    authorization: str | None
    expects: bool
    seconds: float  # that the request may take
    lines: bytes  # for services: what passes, and who asks from where
    fault: Callable[[], TenfoldError] | None  # for which it is refused


def read(headers: Headers, raw: RawHeaders, peer: str, scheme: str, trusted_proxies: int, seconds: float) -> Head:
    """`seconds` is the longest that a request may take."""
    client = client_of(peer, scheme, headers, trusted_proxies)
    lines: list[bytes] = []
    fault: Callable[[], TenfoldError] | None = None
    expects = hdrs.EXPECT in headers
    try:
        check_head(headers)
        if expects and headers[hdrs.EXPECT].lower() != "100-continue":
            raise Malformed("only 100-continue can be expected")
        seconds = time_allowed(headers.get(http_client.DEADLINE_HEADER), seconds)
        lines = to_service(raw, connection=hdrs.CONNECTION in headers) + _lines_of(client)
        lines.append(b"Request-Timeout: %d" % max(1, int(seconds * 1000)))
        if hdrs.COOKIE in headers:
            lines += consistency_lines(headers)
    except TenfoldError as error:
        fault = partial(type(error), error.detail)
    return Head(
        raw, client, tracing.extract(headers), sensible_id(headers.get(REQUEST_ID)), headers.get(hdrs.ORIGIN),
        headers.get(hdrs.AUTHORIZATION), expects, seconds, block(lines), fault,
    )  # fmt: skip


def block(lines: Sequence[bytes]) -> bytes:
    """`lines` with their ends. Raises `ValueError` when one would be two."""
    joined = b"".join([line + b"\r\n" for line in lines])
    if joined.count(b"\n") != len(lines) or joined.count(b"\r") != len(lines):
        raise ValueError("a line break in a header")
    return joined


def _lines_of(client: Client) -> list[bytes]:
    """What a service is told of it."""
    return [
        f"X-Forwarded-For: {client.address}".encode("utf-8", "surrogateescape"),
        f"X-Forwarded-Proto: {client.scheme}".encode(),
        f"X-Forwarded-Host: {client.host}".encode("utf-8", "surrogateescape"),
    ]


def client_of(peer: str, scheme: str, headers: Headers, trusted_proxies: int) -> Client:
    """Each trusted proxy appended the address it saw to X-Forwarded-For, so ours count from the right."""
    host = headers.get(hdrs.HOST, "")
    if trusted_proxies == 0:
        return Client(peer, scheme, host)
    given = ",".join(headers.getall(hdrs.X_FORWARDED_FOR, ()))
    chain = [entry.strip() for entry in given.split(",") if entry.strip()]
    address = chain[-min(trusted_proxies, len(chain))] if chain else peer
    forwarded_scheme = headers.get(hdrs.X_FORWARDED_PROTO, scheme).rpartition(",")[2].strip().lower()
    forwarded_host = headers.get(hdrs.X_FORWARDED_HOST, host).rpartition(",")[2].strip()
    return Client(_bare(address), forwarded_scheme if forwarded_scheme in ("http", "https") else scheme, forwarded_host)


def _bare(address: str) -> str:
    """`1.2.3.4:567`, `[::1]:567` and `[::1]` without port and brackets."""
    if address.startswith("["):
        return address[1:].partition("]")[0]
    return address.partition(":")[0] if address.count(":") == 1 else address


def check_head(headers: Headers) -> None:
    """Raises `AmbiguousRequest` on what two parsers could read differently and ours lets pass."""
    if hdrs.TRANSFER_ENCODING in headers and hdrs.CONTENT_LENGTH in headers:
        raise AmbiguousRequest("both Content-Length and Transfer-Encoding")
    if len(headers.getall(hdrs.AUTHORIZATION, ())) > 1:  # of Host and of both framings the parser refuses a second one
        raise AmbiguousRequest("more than one Authorization")


def climbs(path: str) -> bool:
    """Whether a path, as sent, could lead elsewhere or cut a line."""
    decoded = unquote_to_bytes(path)
    return bool(_CONTROL.search(decoded) or _DOTS.search(decoded))


def to_service(headers: RawHeaders, *, connection: bool = True) -> list[bytes]:
    """The lines that go on: without the hop's own, those that `Connection` names (if there is one), and forged ones."""
    if connection and (named := _named_by_connection(headers)):
        return [name + b": " + value for name, value in headers if _PASSES[name] and name.lower() not in named]
    return [name + b": " + value for name, value in headers if _PASSES[name]]


def to_caller(lines: Sequence[bytes]) -> tuple[list[bytes], int]:
    """The lines that go back, without the hop's own and what we say ourselves; which of `Seen` were there, or `ODD`."""
    back: list[bytes] = []
    seen = 0
    named: frozenset[bytes] = frozenset()
    for line in lines:
        passes, flag = _LINES.get(line) or _line_back(line)
        if passes:
            back.append(line)
        if flag:
            seen |= flag | ODD if flag & seen else flag  # of two, which counts is for a parser to say
            if flag & Seen.CONNECTION:
                named |= _named(line.partition(b": ")[2])
    if named:
        back = [line for line in back if line.partition(b":")[0].lower() not in named]
    return back, seen


def _named_by_connection(headers: RawHeaders) -> frozenset[bytes]:
    """What belongs to the hop besides."""
    values = [value for name, value in headers if len(name) == _CONNECTION_LENGTH and name.lower() == b"connection"]
    return _named(b",".join(values)) if values else frozenset()


@lru_cache(maxsize=256)
def _named(connection: bytes) -> frozenset[bytes]:
    return frozenset(name.strip().lower() for name in connection.split(b",")) - _NOT_NAMED


def consistency_cookie(headers: Mapping[str, str]) -> str | None:
    cookie = headers.get(hdrs.COOKIE)
    found = _COOKIE.search(cookie) if cookie is not None else None
    return found[1] if found is not None else None


def consistency_lines(headers: Headers) -> list[bytes]:
    """What a service is told of the caller's writes where only its cookie knows of them."""
    if consistency.HEADER in headers or (token := consistency_cookie(headers)) is None:
        return []
    return [f"{consistency.HEADER}: {token}".encode()]


def set_cookie(token: bytes, scheme: str) -> bytes | None:
    """The line that keeps a consistency token in a browser."""
    if not _TOKEN.fullmatch(token):
        return None
    secure = b"; Secure" if scheme == "https" else b""
    return b"Set-Cookie: %b=%b; HttpOnly; Max-Age=%d; Path=/api; SameSite=Lax%b" % (
        COOKIE.encode(), token, _COOKIE_SECONDS, secure,
    )  # fmt: skip
