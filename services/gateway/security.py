"""Headers that every answer of the public door has, whoever made it."""

from aiohttp import hdrs, web

from services.gateway.headers import client_of

# For whatever a service answers without a policy of its own: shown alone, it can load and run nothing.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; form-action 'self'; frame-ancestors 'none'; base-uri 'none'"
_HTTPS_SECONDS = 365 * 24 * 3600


def protect(app: web.Application, trusted_proxies: int) -> None:
    async def add(request: web.Request, response: web.StreamResponse) -> None:
        headers = response.headers
        headers.popall(hdrs.SERVER, None)  # aiohttp has just named itself and its version
        headers.setdefault("Content-Security-Policy", _POLICY)
        headers.setdefault("Referrer-Policy", "no-referrer")
        if client_of(request, trusted_proxies).scheme == "https":
            headers.setdefault("Strict-Transport-Security", f"max-age={_HTTPS_SECONDS}")

    app.on_response_prepare.append(add)
