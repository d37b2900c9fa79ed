"""A service's HTTP application, made from its table of routes.

A handler declares the types of path, query, body and answer in its signature; from that one declaration come decoding,
422 answers that name each wrong field, and the OpenAPI document (`shared.openapi`):

    async def rename(self, call: Call, media_id: UUID, body: Rename) -> Reply[Media]: ...

`call` is the request, `body` its JSON, `query` its query string; every other parameter is part of the path. A handler
that answers bytes or a stream returns a `web.StreamResponse`.
"""

import functools
import hashlib
import inspect
import re
import typing
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Generic, TypeVar
from uuid import UUID

import msgspec
from aiohttp import hdrs, web

from shared import idempotency, metrics
from shared.auth import Principal, Role, TokenVerifier
from shared.errors import (
    FieldError,
    Forbidden,
    InvalidInput,
    Malformed,
    NotFound,
    PreconditionFailed,
    Unauthenticated,
    Unavailable,
    UnsupportedType,
)
from shared.middleware import CONTEXT, LIMITED, MIDDLEWARES, ROUTE, STREAMING, Context, set_answer_headers
from shared.resilience import AdaptiveLimit
from shared.settings import ProcessSettings

T = TypeVar("T")
_JSON = "application/json"
_READS = frozenset({hdrs.METH_GET, hdrs.METH_HEAD})
_encoder = msgspec.json.Encoder()
_POINTER = re.compile(r"`\$(?P<path>.*)`$")
# Narrow, so that `/media/usage` is no `/media/{media_id}`: a method it does not have is 405 and not 404.
_UUID = "[0-9a-fA-F-]{32,36}"
_PATH_PARAMETER = re.compile(r"{(\w+)}")


class Access(Enum):
    """Who may call a route."""

    PUBLIC = "anybody"
    OPTIONAL = "anybody; a valid token is taken notice of"
    USER = "who has a valid token"
    ADMIN = "who has the role admin"


# In Python 3.11 looking a member up in an enum costs as much as calling a function.
_PUBLIC, _OPTIONAL, _ADMIN = Access.PUBLIC, Access.OPTIONAL, Access.ADMIN


@dataclass(frozen=True)
class Reply(Generic[T]):
    """A JSON answer. `version` becomes the `ETag`; the status is the route's unless given."""

    body: T
    version: int | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    status: int | None = None


NO_CONTENT: Reply[None] = Reply(None)


@dataclass(frozen=True)
class Route:
    """A line of the URL table.

    `consumes` lists content types of a body that the handler reads itself; `idempotent` says that it takes an
    Idempotency-Key, with `call.once`. A `streaming` route may take as long as it takes, and bounds itself. Under
    overload `first` is refused last, and its times tell nothing: what others depend on, and what waits for something
    that has a bound of its own.
    """

    method: str
    path: str
    handler: Callable[..., Awaitable[Any]]
    access: Access = Access.USER
    status: int = 200
    streaming: bool = False
    consumes: tuple[str, ...] = ()
    idempotent: bool = False
    first: bool = False

    @functools.cached_property
    def signature(self) -> "Signature":
        return Signature.of(self.handler, set(_PATH_PARAMETER.findall(self.path)))


@dataclass(frozen=True)
class Signature:
    """What a handler declares. `answer` is `None` where it returns a response of its own."""

    path: Mapping[str, Any]
    query: Any
    body: Any
    answer: Any

    @classmethod
    def of(cls, handler: Callable[..., Any], path_names: set[str]) -> "Signature":
        hints = typing.get_type_hints(handler, include_extras=True)
        names = [name for name in inspect.signature(handler).parameters if name != "call"]
        path = {name: hints[name] for name in names if name not in ("body", "query")}
        if set(path) != path_names:
            raise TypeError(f"{handler.__qualname__}: takes {sorted(path)} from a path with {sorted(path_names)}")
        returned = hints["return"]
        answer = typing.get_args(returned)[0] if typing.get_origin(returned) is Reply else None
        return cls(path, hints.get("query"), hints.get("body"), answer)


class Call:
    """One request, as a handler sees it."""

    def __init__(self, request: web.Request, principal: Principal | None, raw_body: bytes) -> None:
        self.request = request
        self.maybe_principal = principal
        self._raw_body = raw_body

    @property
    def principal(self) -> Principal:
        if self.maybe_principal is None:
            raise Unauthenticated
        return self.maybe_principal

    @property
    def user_id(self) -> UUID:
        return self.principal.user_id

    def once(self, fingerprint: bytes | None = None) -> idempotency.Once:
        """The request's Idempotency-Key. A handler that reads the body itself passes its hash as `fingerprint`."""
        key = self.request.headers.get(idempotency.HEADER)
        if key is not None and not (1 <= len(key) <= idempotency.MAX_LENGTH and key.isprintable()):
            raise InvalidInput(
                [FieldError(f"/{idempotency.HEADER}", f"takes 1 to {idempotency.MAX_LENGTH} printable characters")]
            )
        parts = (self.request.method.encode(), self.request.path.encode(), fingerprint or self._raw_body)
        digest = hashlib.blake2b(b"\n".join(parts), digest_size=32).digest()
        principal = str(self.maybe_principal.user_id) if self.maybe_principal else "anonymous"
        return idempotency.Once(principal, key, digest)

    def expected_version(self) -> int | None:
        """The version that `If-Match` names; `None` when any will do. Raises `PreconditionFailed` on foreign tags."""
        tag = self.request.headers.get(hdrs.IF_MATCH)
        if tag is None or tag.strip() == "*":
            return None
        if match := re.fullmatch(r'"v(\d{1,18})"', tag.strip()):
            return int(match[1])
        raise PreconditionFailed


def etag(version: int) -> str:
    return f'"v{version}"'


SERVICE: web.AppKey[str] = web.AppKey("service", str)


def build(
    service: str,
    routes: Sequence[Route],
    verifier: TokenVerifier | None,
    settings: ProcessSettings,
    *,
    documentation: Callable[[], Mapping[str, Any]] | None = None,
) -> web.Application:
    """The application of `service`. Routes that need a token need a `verifier`."""
    app = web.Application(middlewares=MIDDLEWARES, client_max_size=settings.max_body_bytes)
    app[SERVICE] = service
    limit = AdaptiveLimit(settings.max_concurrent_requests)
    metrics.HTTP_LIMIT.labels(service).set_function(lambda: limit.limit)
    metrics.HTTP_IN_FLIGHT.labels(service).set_function(lambda: limit.in_flight)
    app[CONTEXT] = Context(service, settings.request_timeout_seconds, limit)
    app.on_response_prepare.append(set_answer_headers)
    own_head = {route.path for route in routes if route.method == hdrs.METH_HEAD}
    for route in routes:
        if route.access is not Access.PUBLIC and verifier is None:
            raise TypeError(f"{route.method} {route.path} needs a token verifier")
        # RFC 9110, 9.3.2: HEAD is answered like GET; aiohttp leaves out the body. A stream has to be asked for itself.
        answers_head = route.method == hdrs.METH_GET and not route.streaming and route.path not in own_head
        for method in (route.method, hdrs.METH_HEAD) if answers_head else (route.method,):
            added = app.router.add_route(method, _pattern(route), _endpoint(route, verifier, limit))
            ROUTE[added] = route.path
            if route.streaming:
                STREAMING.add(added)
            if not (route.streaming or route.first):
                LIMITED.add(added)
    if documentation is not None:
        document = _encoder.encode(documentation())
        ROUTE[app.router.add_get("/openapi.json", _constant(document))] = "/openapi.json"
    return app


def _pattern(route: Route) -> str:
    """The path as the router takes it."""
    types = route.signature.path
    return _PATH_PARAMETER.sub(lambda m: f"{{{m[1]}:{_UUID}}}" if types[m[1]] is UUID else m[0], route.path)


def _constant(document: bytes) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
    async def answer(_request: web.Request) -> web.StreamResponse:
        return web.Response(body=document, content_type=_JSON)

    return answer


def _endpoint(
    route: Route, verifier: TokenVerifier | None, limit: AdaptiveLimit
) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
    signature, kind = route.signature, f"{route.method} {route.path}"

    async def endpoint(request: web.Request) -> web.StreamResponse:
        principal = await authenticate(request.headers.get(hdrs.AUTHORIZATION), route.access, verifier)
        arguments: dict[str, Any] = {
            name: _path_value(request.match_info[name], type_) for name, type_ in signature.path.items()
        }
        if signature.query is not None:
            arguments["query"] = _query_value(request, signature.query)
        raw = b""
        if signature.body is not None:
            raw = await _json_bytes(request)
            arguments["body"] = decode_body(raw, signature.body)
        call = Call(request, principal, raw)
        if route.streaming:
            answer = await route.handler(call, **arguments)
        else:
            # Only now that the body is here: who sends it slowly takes nobody's place.
            began, answer = limit.take(first=route.first), None
            if began is None:
                raise Unavailable("overloaded")
            try:
                answer = await route.handler(call, **arguments)
            finally:
                if route.first:
                    limit.leave()
                elif answer is None:
                    limit.give_up(kind, began)
                else:
                    limit.give(kind, began)
        return answer if isinstance(answer, web.StreamResponse) else _render(request, answer, route.status)

    return endpoint


async def authenticate(header: str | None, access: Access, verifier: TokenVerifier | None) -> Principal | None:
    """Who calls, by the `Authorization` header, where `access` asks for it. Raises `Unauthenticated` or `Forbidden`."""
    if verifier is None or access is _PUBLIC or (access is _OPTIONAL and header is None):
        return None
    scheme, _, token = (header or "").partition(" ")
    if scheme.lower() != "bearer" or not token:
        raise Unauthenticated
    principal = await verifier.verify(token.strip())
    if access is _ADMIN and principal.role is not Role.ADMIN:
        raise Forbidden
    return principal


def _path_value(raw: str, type_: Any) -> Any:
    try:
        return msgspec.convert(raw, type_, strict=False)
    except msgspec.ValidationError:
        raise NotFound from None  # no resource has such a name


def _query_value(request: web.Request, type_: Any) -> Any:
    # Iterating over the names gives each once, however often it is there.
    if twice := [name for name in request.query if len(request.query.getall(name)) > 1]:
        raise InvalidInput([FieldError(f"?{name}", "given twice") for name in twice])
    try:
        return msgspec.convert(dict(request.query), type_, strict=False)
    except msgspec.ValidationError as error:
        raise InvalidInput([_field_error(error, prefix="?")]) from None


async def _json_bytes(request: web.Request) -> bytes:
    if request.content_type != _JSON:
        raise UnsupportedType(f"send {_JSON}")
    if request.headers.get(hdrs.CONTENT_ENCODING, "identity") != "identity":
        raise UnsupportedType("send the body uncompressed")
    return await request.read()


def decode_body(raw: bytes, type_: type[T]) -> T:
    """Raises `Malformed` when it is no JSON and `InvalidInput` naming every wrong field when it is not a `type_`."""
    try:
        return msgspec.json.decode(raw, type=type_)
    except msgspec.ValidationError as error:
        first = error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise Malformed(str(error)) from None
    except RecursionError:
        raise Malformed("nested too deeply") from None
    try:
        document = msgspec.json.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:  # broken after the first wrong field
        raise Malformed(str(error)) from None
    except RecursionError:
        raise Malformed("nested too deeply") from None
    raise InvalidInput(_all_field_errors(document, type_) or [_field_error(first)])


def _all_field_errors(document: Any, type_: Any) -> list[FieldError]:
    """msgspec stops at the first fault; a form wants them all, so each field is looked at on its own."""
    if not isinstance(document, dict) or not (isinstance(type_, type) and issubclass(type_, msgspec.Struct)):
        return []
    hints = typing.get_type_hints(type_, include_extras=True)
    fields = {f.encode_name: f for f in msgspec.structs.fields(type_)}
    errors = [FieldError(f"/{name}", "is not a known field") for name in document if name not in fields]
    for name, declared in fields.items():
        if name not in document:
            if declared.required:
                errors.append(FieldError(f"/{name}", "is required"))
            continue
        try:
            msgspec.convert(document[name], hints[declared.name])
        except msgspec.ValidationError as error:
            errors.append(_field_error(error, prefix=f"/{name}"))
    return errors


def _field_error(error: msgspec.ValidationError, prefix: str = "") -> FieldError:
    """`Expected `str`, got `int` - at `$.a[0].b`` -> `/a/0/b`."""
    text, _, where = str(error).partition(" - at ")
    match = _POINTER.search(where)
    path = re.sub(r"\.|\[(\d+)\]", lambda m: f"/{m[1] or ''}" if m[1] else "/", match["path"]) if match else ""
    if named := re.search(r"(?:missing required|unknown) field `(\w+)`", text):
        path += f"/{named[1]}"
    return FieldError(prefix + (path.removeprefix("/") if prefix == "?" else path), text)


def _render(request: web.Request, reply: Reply[Any], status: int) -> web.Response:
    headers = dict(reply.headers)
    if reply.version is not None:
        headers[hdrs.ETAG] = etag(reply.version)
        if request.method in _READS and request.headers.get(hdrs.IF_NONE_MATCH) == headers[hdrs.ETAG]:
            return web.Response(status=304, headers=headers)
    headers.setdefault(hdrs.CACHE_CONTROL, "no-store")
    if reply.body is None:
        return web.Response(status=reply.status or (204 if status == 200 else status), headers=headers)
    return web.Response(
        status=reply.status or status, body=_encoder.encode(reply.body), content_type=_JSON, headers=headers
    )
