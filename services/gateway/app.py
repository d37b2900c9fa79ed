"""The composition root of the gateway: builds every object once; the only place that knows all."""

from contextlib import AbstractAsyncContextManager

from aiohttp import web

from services.gateway import proxy, security
from services.gateway.answers import Common
from services.gateway.cors import Cors
from services.gateway.documents import Documents
from services.gateway.door import Door
from services.gateway.handlers import VERSION, Handlers
from services.gateway.limits import Limits
from services.gateway.pages import Pages, load
from services.gateway.routes import pages, routes
from services.gateway.service import Gateway
from services.gateway.settings import Settings
from services.gateway.upstream_pool import Pool
from services.gateway.upstreams import UPSTREAMS
from shared import application, listener, openapi
from shared.auth import JwksClient, TokenVerifier
from shared.http_client import ServiceClient
from shared.limits import RateLimiter
from shared.resilience import Fleet
from shared.runner import Process, Service

NAME = "gateway"


def fleet(name: str, settings: Settings) -> AbstractAsyncContextManager[Fleet[Pool]]:
    most = settings.upstream_max_connections
    return Fleet.opened(name, settings.upstream[name], lambda url: Pool(url, most), most)


async def api(process: Process, settings: Settings) -> web.Application:
    verifier = TokenVerifier(JwksClient(settings.jwks_url, process.http))
    instances = settings.gateway_instances * settings.workers
    limits = Limits(RateLimiter(await process.redis(settings.redis_url), instances), settings.limits())
    fleets = {upstream.name: await process.enter(fleet(upstream.name, settings)) for upstream in UPSTREAMS}
    clients = {name: ServiceClient(found, process.http) for name, found in fleets.items()}
    documents = Documents(lambda: openapi.document("Tenfold", VERSION, table), UPSTREAMS, clients)
    table = routes(Handlers(Gateway(clients), documents, limits, settings.trusted_proxies))
    app = application.build(NAME, [*table, *pages(Pages(load()))], verifier, settings)
    cors = Cors(settings.cors_origins)
    cors.apply_to(app)
    security.protect(app, settings.trusted_proxies)
    common = Common(cors)
    proxies = [proxy.Proxy(u, settings, fleets[u.name], verifier, limits, cors, common) for u in UPSTREAMS]
    app[listener.CONNECTION] = Door(proxies, common).connection()
    app.on_shutdown.extend(passing.end_event_streams for passing in proxies)
    return app


SERVICE = Service(NAME, Settings, api)
