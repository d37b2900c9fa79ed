"""The composition root of media: builds every object once; the only place that knows all."""

import asyncio
from functools import partial
from pathlib import Path

from aiohttp import web

from services.media import repository
from services.media.blobs import Sweeper
from services.media.children import Children
from services.media.consumers import consumers
from services.media.handlers import Handlers
from services.media.processing import Processing, clear_scratch
from services.media.routes import routes
from services.media.service import Media
from services.media.settings import Settings
from services.media.signing import UrlSigner
from services.media.uploads import Uploads
from shared import application, openapi
from shared.auth import JwksClient, TokenVerifier
from shared.clock import SystemClock
from shared.consumer import Consumer
from shared.database import Database
from shared.housekeeping import keep_tidy
from shared.objects import Objects
from shared.outbox import Outbox, Relay
from shared.runner import Process, Service

NAME = "media"


async def api(process: Process, settings: Settings) -> web.Application:
    clock = SystemClock()
    db = await process.enter(Database.opened(NAME, settings, process.health, repository.CONSTRAINTS))
    await process.background("media-housekeeping", partial(keep_tidy, db))
    outbox = Outbox(NAME, await process.enter(Relay.opened(NAME, db, await process.bus(settings))))
    objects = Objects.at(settings.object_store_url, settings.object_store_public_endpoint, process.http)
    signer = UrlSigner(settings.url_secret, settings.url_seconds, clock)
    media = Media(db, outbox, objects, signer, settings)
    uploads = Uploads(db, outbox, objects, Sweeper(db, objects), signer, settings, clock)
    table = routes(Handlers(media, uploads))
    return application.build(
        NAME,
        table,
        TokenVerifier(JwksClient(settings.jwks_url, process.http), clock),
        settings,
        documentation=lambda: openapi.document("Media", "1", table),
    )


async def worker(process: Process, settings: Settings) -> None:
    db = await process.enter(Database.opened(NAME, settings, process.health, repository.CONSTRAINTS))
    bus = await process.bus(settings)
    outbox = Outbox(NAME, await process.enter(Relay.opened(NAME, db, bus)))
    objects = Objects.at(settings.object_store_url)
    children = await process.enter(Children.opened(settings))
    sweeper = Sweeper(db, objects)
    processing = Processing(db, outbox, objects, children, sweeper, settings.processes)
    await asyncio.to_thread(clear_scratch)
    await process.background("media-sweeper", lambda: sweeper.keep_sweeping(settings.sweep_seconds))
    consumer = Consumer(
        NAME, consumers(processing), db, settings.event_retry_delays_seconds, settings.event_handler_seconds
    )
    # Many in hand, for the owners to take turns; `Processing` works on few at a time.
    await process.enter(bus.consuming(consumer, settings.events_in_hand))


SERVICE = Service(NAME, Settings, api, worker, Path(__file__).parent / "migrations")
