"""The URL tables of what the gateway answers itself; what it passes on stands in `upstreams.py`."""

from collections.abc import Awaitable, Callable

from aiohttp import web

from services.gateway.handlers import Handlers
from services.gateway.pages import Pages
from shared.application import Access, Route


def routes(h: Handlers) -> list[Route]:
    return [
        Route("GET", "/api/v1", h.get_index, Access.PUBLIC),
        Route("GET", "/api/v1/home", h.get_home),
        Route("GET", "/api/openapi.json", h.get_document, Access.PUBLIC),
    ]


def pages(p: Pages) -> list[Route]:
    """For browsers, and in no API document."""
    table: dict[str, Callable[..., Awaitable[web.StreamResponse]]] = {
        "/": p.home,
        "/api/docs": p.documentation,
        "/static/{name}": p.asset,
        "/favicon.ico": p.icon,
        "/robots.txt": p.robots,
    }
    return [Route("GET", path, answer, Access.PUBLIC) for path, answer in table.items()]
