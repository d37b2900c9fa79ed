"""What may pass the door: checks on a request's head, and the headers that go on to services and back to callers."""

import re
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import NamedTuple
from urllib.parse import unquote_to_bytes

from aiohttp import hdrs, web
from multidict import CIMultiDict

from services.gateway.errors import AmbiguousRequest
from shared import consistency
from shared.errors import Malformed

HOP_BY_HOP = frozenset(
    {
        "connection",
        "keep-alive",
        "proxy-authenticate",
        "proxy-authorization",
        "proxy-authentication-info",
        "proxy-connection",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
    }
)
# Only we say who calls and from where; `Host` and `Expect` are between the caller and us.
_OURS = frozenset(
    {
        "host",
        "expect",
        "forwarded",
        "via",
        "x-real-ip",
        "x-client-ip",
        "x-cluster-client-ip",
        "true-client-ip",
        "cf-connecting-ip",
        "x-original-url",
        "x-rewrite-url",
        "x-http-method-override",
        "x-request-id",
        "request-timeout",
        "traceparent",
        "tracestate",
        "baggage",
    }
)
_OURS_PREFIXES = ("x-forwarded-", "x-user", "x-principal", "x-auth", "x-role", "x-tenfold-", "x-envoy-")
_NOT_BACK = frozenset({"server", "x-powered-by", "date", "x-request-id"})

COOKIE = "tenfold_consistency"
_COOKIE_VALUE = re.compile(r"[0-9a-z.-]{1,256}")
_DOTS = re.compile(rb"(?:^|[/\\])\.{1,2}(?:[/\\]|$)")
_CONTROL = re.compile(rb"[\x00-\x1f\x7f]")


class Client(NamedTuple):
    """Who is on the other side, as far as the proxies before us can be trusted."""

    address: str
    scheme: str
    host: str


def client_of(request: web.Request, trusted_proxies: int) -> Client:
    """Each trusted proxy appended the address it saw to X-Forwarded-For, so ours count from the right."""
    peer = request.remote or ""
    host = request.headers.get(hdrs.HOST, "")
    if trusted_proxies == 0:
        return Client(peer, request.scheme, host)
    given = ",".join(request.headers.getall(hdrs.X_FORWARDED_FOR, ()))
    chain = [entry.strip() for entry in given.split(",") if entry.strip()]
    address = chain[-min(trusted_proxies, len(chain))] if chain else peer
    scheme = request.headers.get(hdrs.X_FORWARDED_PROTO, request.scheme).rpartition(",")[2].strip().lower()
    forwarded_host = request.headers.get(hdrs.X_FORWARDED_HOST, host).rpartition(",")[2].strip()
    return Client(_bare(address), scheme if scheme in ("http", "https") else request.scheme, forwarded_host)


def _bare(address: str) -> str:
    """`1.2.3.4:567`, `[::1]:567` and `[::1]` without port and brackets."""
    if address.startswith("["):
        return address[1:].partition("]")[0]
    return address.partition(":")[0] if address.count(":") == 1 else address


def check_head(request: web.Request) -> None:
    """Raises `AmbiguousRequest` or `Malformed` on what two parsers could read differently."""
    headers = request.headers
    if len(headers.getall(hdrs.HOST, ())) > 1:
        raise AmbiguousRequest("more than one Host")
    if len(headers.getall(hdrs.CONTENT_LENGTH, ())) > 1:
        raise AmbiguousRequest("more than one Content-Length")
    if hdrs.TRANSFER_ENCODING in headers and hdrs.CONTENT_LENGTH in headers:
        raise AmbiguousRequest("both Content-Length and Transfer-Encoding")
    if len(headers.getall(hdrs.AUTHORIZATION, ())) > 1:
        raise AmbiguousRequest("more than one Authorization")


def target_of(request: web.Request) -> str:
    """Path and query exactly as sent, nothing decoded. Raises `Malformed` on paths that could climb or cut lines."""
    target = request.raw_path
    if not target.startswith("/"):  # absolute form, as sent to proxies
        target = str(request.rel_url)
    target = target.partition("#")[0]
    path = unquote_to_bytes(target.partition("?")[0])
    if _CONTROL.search(path) or _DOTS.search(path):
        raise Malformed("the path holds dot segments or control characters")
    return target


def _removed(values: Iterable[str]) -> Set[str]:
    """What belongs to the hop, by the values of its `Connection` headers."""
    named = {name.strip().lower() for value in values for name in value.split(",")} - HOP_BY_HOP
    return HOP_BY_HOP | named if named else HOP_BY_HOP


def to_service(request: web.Request, client: Client, ours: Mapping[str, str]) -> CIMultiDict[str]:
    """The headers that go on: first the hop's own are removed, then forged ones, then `ours` are added."""
    removed = _removed(request.headers.getall(hdrs.CONNECTION, ()))
    outgoing: CIMultiDict[str] = CIMultiDict()
    for name, value in request.headers.items():
        low = name.lower()
        # `X_User_Id` reads as `X-User-Id` to some servers.
        if low in removed or low in _OURS or "_" in low or low.startswith(_OURS_PREFIXES):
            continue
        outgoing.add(name, value)
    if not request.can_read_body:
        outgoing.popall(hdrs.CONTENT_LENGTH, None)
    outgoing[hdrs.X_FORWARDED_FOR] = client.address
    outgoing[hdrs.X_FORWARDED_PROTO] = client.scheme
    outgoing[hdrs.X_FORWARDED_HOST] = client.host
    if consistency.HEADER not in outgoing and (token := consistency_cookie(request)) is not None:
        outgoing[consistency.HEADER] = token
    outgoing.update(ours)
    return outgoing


def to_caller(headers: Sequence[tuple[str, str]]) -> CIMultiDict[str]:
    removed = _removed([value for name, value in headers if name.lower() == "connection"]) | _NOT_BACK
    return CIMultiDict([(name, value) for name, value in headers if name.lower() not in removed])


def consistency_cookie(request: web.Request) -> str | None:
    value = request.cookies.get(COOKIE, "") if hdrs.COOKIE in request.headers else ""
    return value if _COOKIE_VALUE.fullmatch(value) else None
