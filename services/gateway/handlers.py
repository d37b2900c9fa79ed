"""The gateway's own API: parse -> one service call -> answer."""

from typing import Any

from aiohttp import hdrs

from services.gateway import headers as hygiene
from services.gateway.documents import Documents
from services.gateway.limits import Limits
from services.gateway.schemas import Home, Index
from services.gateway.service import Gateway
from services.gateway.upstreams import RouteClass
from shared import consistency, middleware
from shared.application import Call, Reply

VERSION = "1"

_INDEX = Index(
    "Tenfold",
    VERSION,
    {
        "self": "/api/v1",
        "home": "/api/v1/home",
        "openapi": "/api/openapi.json",
        "documentation": "/api/docs",
        "users": "/api/v1/users",
        "sessions": "/api/v1/sessions",
        "media": "/api/v1/media",
        "notifications": "/api/v1/notifications",
        "keys": "/.well-known/jwks.json",
    },
)


class Handlers:
    def __init__(self, gateway: Gateway, documents: Documents, limits: Limits, trusted_proxies: int) -> None:
        self._gateway = gateway
        self._documents = documents
        self._limits = limits
        self._trusted_proxies = trusted_proxies

    async def get_index(self, call: Call) -> Reply[Index]:
        """Say where to find what"""
        return Reply(_INDEX, headers=await self._limited(call))

    async def get_home(self, call: Call) -> Reply[Home]:
        """Show the start page in one call; in part when a service is down"""
        limited = await self._limited(call)
        request = call.request
        token = request.headers.get(consistency.HEADER) or hygiene.consistency_cookie(request.headers)
        home = await self._gateway.home(
            {
                hdrs.AUTHORIZATION: request.headers[hdrs.AUTHORIZATION],
                middleware.REQUEST_ID: middleware.request_id(request),
                **({consistency.HEADER: token} if token else {}),
            }
        )
        return Reply(home, headers=limited)

    async def get_document(self, call: Call) -> Reply[dict[str, Any]]:
        """Show this document"""
        limited = await self._limited(call)
        return Reply(dict(await self._documents.merged()), headers={hdrs.CACHE_CONTROL: "no-cache", **limited})

    async def _limited(self, call: Call) -> dict[str, str]:
        request = call.request
        client = hygiene.client_of(request.remote or "", request.scheme, request.headers, self._trusted_proxies)
        standing = await self._limits.hit(RouteClass.DEFAULT, call.maybe_principal, client.address)
        return standing.headers()
