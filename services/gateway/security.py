"""Headers that every answer of the public door has, whoever made it."""

from aiohttp import hdrs, web

from services.gateway.headers import Seen, client_of

# For whatever a service answers without a policy of its own: shown alone, it can load and run nothing.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; form-action 'self'; frame-ancestors 'none'; base-uri 'none'"
_HTTPS_SECONDS = 365 * 24 * 3600
_HEADERS = {
    Seen.CONTENT_SECURITY_POLICY: ("Content-Security-Policy", _POLICY),
    Seen.REFERRER_POLICY: ("Referrer-Policy", "no-referrer"),
}
_HTTPS_HEADERS = {Seen.STRICT_TRANSPORT_SECURITY: ("Strict-Transport-Security", f"max-age={_HTTPS_SECONDS}")}
GIVEN = sum(_HEADERS | _HTTPS_HEADERS)


def headers(scheme: str) -> dict[int, tuple[str, str]]:
    """By the bit in `Seen` that says that a service has given one itself."""
    return _HEADERS | _HTTPS_HEADERS if scheme == "https" else _HEADERS


def protect(app: web.Application, trusted_proxies: int) -> None:
    async def add(request: web.Request, response: web.StreamResponse) -> None:
        response.headers.popall(hdrs.SERVER, None)  # aiohttp has just named itself and its version
        client = client_of(request.remote or "", request.scheme, request.headers, trusted_proxies)
        for name, value in headers(client.scheme).values():
            response.headers.setdefault(name, value)

    app.on_response_prepare.append(add)
