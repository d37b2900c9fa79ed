"""Which other sites' pages may call the API from a browser (`CORS_ORIGINS`); by default none.

No cookie authenticates anybody here, so credentials are not allowed across origins, and none are needed.
"""

from collections.abc import Collection, Mapping

from aiohttp import hdrs, web

from shared.middleware import Handler

_METHODS = "GET, HEAD, POST, PUT, PATCH, DELETE"
_REQUEST_HEADERS = (
    "Authorization, Content-Type, Idempotency-Key, If-Match, If-None-Match, Range, Last-Event-ID, "
    "Consistency-Token, Request-Timeout, X-Request-Id"
)
_ANSWER_HEADERS = (
    "Consistency-Token, Content-Range, ETag, Location, RateLimit, RateLimit-Policy, Retry-After, X-Request-Id"
)
_PREFLIGHT_SECONDS = "600"
PREFLIGHT_HEADERS: dict[str, str] = {
    hdrs.ACCESS_CONTROL_ALLOW_METHODS: _METHODS,
    hdrs.ACCESS_CONTROL_ALLOW_HEADERS: _REQUEST_HEADERS,
    hdrs.ACCESS_CONTROL_MAX_AGE: _PREFLIGHT_SECONDS,
}


class Cors:
    """Lets pages of `origins` (`https://app.example.com`) call."""

    def __init__(self, origins: Collection[str]) -> None:
        self.origins = frozenset(origins)

    def __bool__(self) -> bool:
        return bool(self.origins)

    def asks_first(self, method: str, headers: Mapping[str, str]) -> bool:
        """Whether it is a browser's question if a page may call."""
        asks = method == hdrs.METH_OPTIONS and hdrs.ACCESS_CONTROL_REQUEST_METHOD in headers
        return asks and headers.get(hdrs.ORIGIN) in self.origins

    def headers(self, origin: str | None) -> dict[str, str]:
        """What an answer says about it, where it is configured at all."""
        if not self.origins:
            return {}
        if origin is None or origin not in self.origins:
            return {hdrs.VARY: hdrs.ORIGIN}
        return {
            hdrs.VARY: hdrs.ORIGIN,
            hdrs.ACCESS_CONTROL_ALLOW_ORIGIN: origin,
            hdrs.ACCESS_CONTROL_EXPOSE_HEADERS: _ANSWER_HEADERS,
        }

    def apply_to(self, app: web.Application) -> None:
        @web.middleware
        async def preflight(request: web.Request, handler: Handler) -> web.StreamResponse:
            if self.asks_first(request.method, request.headers):
                return web.Response(status=204, headers=PREFLIGHT_HEADERS)
            return await handler(request)

        async def name_origin(request: web.Request, response: web.StreamResponse) -> None:
            for name, value in self.headers(request.headers.get(hdrs.ORIGIN)).items():
                response.headers.add(name, value)

        if self.origins:
            app.middlewares.append(preflight)
            app.on_response_prepare.append(name_origin)
