"""Which other sites' pages may call the API from a browser (`CORS_ORIGINS`); by default none.

No cookie authenticates anybody here, so credentials are not allowed across origins, and none are needed.
"""

from collections.abc import Collection

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


def allow(app: web.Application, origins: Collection[str]) -> None:
    """Let pages of `origins` (`https://app.example.com`) call `app`."""
    if not origins:
        return

    @web.middleware
    async def preflight(request: web.Request, handler: Handler) -> web.StreamResponse:
        asks = request.method == hdrs.METH_OPTIONS and hdrs.ACCESS_CONTROL_REQUEST_METHOD in request.headers
        if not asks or request.headers.get(hdrs.ORIGIN) not in origins:
            return await handler(request)
        return web.Response(
            status=204,
            headers={
                hdrs.ACCESS_CONTROL_ALLOW_METHODS: _METHODS,
                hdrs.ACCESS_CONTROL_ALLOW_HEADERS: _REQUEST_HEADERS,
                hdrs.ACCESS_CONTROL_MAX_AGE: _PREFLIGHT_SECONDS,
            },
        )

    async def name_origin(request: web.Request, response: web.StreamResponse) -> None:
        response.headers.add(hdrs.VARY, hdrs.ORIGIN)
        origin = request.headers.get(hdrs.ORIGIN, "")
        if origin in origins:
            response.headers[hdrs.ACCESS_CONTROL_ALLOW_ORIGIN] = origin
            response.headers[hdrs.ACCESS_CONTROL_EXPOSE_HEADERS] = _ANSWER_HEADERS

    app.middlewares.append(preflight)
    app.on_response_prepare.append(name_origin)
