"""The composition root of the gateway: builds every object once; the only place that knows all."""

from aiohttp import web

from services.gateway import cors, proxy, security
from services.gateway.documents import Documents
from services.gateway.handlers import VERSION, Handlers
from services.gateway.limits import Limits
from services.gateway.pages import Pages, load
from services.gateway.routes import pages, routes
from services.gateway.service import Gateway
from services.gateway.settings import Settings
from services.gateway.upstreams import UPSTREAMS
from shared import application, middleware, openapi
from shared.auth import JwksClient, TokenVerifier
from shared.http_client import ServiceClient
from shared.limits import RateLimiter
from shared.runner import Process, Service

NAME = "gateway"


async def api(process: Process, settings: Settings) -> web.Application:
    verifier = TokenVerifier(JwksClient(settings.jwks_url, process.http))
    limits = Limits(RateLimiter(await process.redis(settings.redis_url), settings.gateway_instances), settings.limits())
    pools = await process.enter(proxy.Pools.opened(settings))
    clients = {u.name: ServiceClient(u.name, settings.upstream[u.name], process.http) for u in UPSTREAMS}
    documents = Documents(lambda: openapi.document("Tenfold", VERSION, table), UPSTREAMS, clients)
    table = routes(Handlers(Gateway(clients), documents, limits, settings.trusted_proxies))
    app = application.build(NAME, [*table, *pages(Pages(load()))], verifier, settings)
    for upstream in UPSTREAMS:
        passing = proxy.Proxy(upstream, settings, pools.by_service[upstream.name], verifier, limits)
        app.on_shutdown.append(passing.end_event_streams)
        for prefix in upstream.prefixes:
            for path in (prefix, prefix + "/{rest:.*}"):
                route = app.router.add_route("*", path, passing.handler(prefix), expect_handler=proxy.no_invitation)
                middleware.ROUTE[route] = path.replace("{rest:.*}", "...")
                middleware.STREAMING.add(route)
    cors.allow(app, settings.cors_origins)
    security.protect(app, settings.trusted_proxies)
    return app


SERVICE = Service(NAME, Settings, api)
