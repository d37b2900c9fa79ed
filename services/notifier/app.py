"""The composition root of notifier: builds every object once; the only place that knows all."""

from functools import partial
from pathlib import Path

from aiohttp import web

from services.notifier import clean_up, wakes
from services.notifier.campaigns import Campaigns, Preparation
from services.notifier.channels.email import Composer
from services.notifier.channels.smtp import Smtp
from services.notifier.channels.webhook import WebhookClient
from services.notifier.consumers import consumers
from services.notifier.handlers import Handlers
from services.notifier.rebuild import COMMANDS
from services.notifier.routes import routes
from services.notifier.sender import Sender
from services.notifier.service import Inbox, Notifier
from services.notifier.settings import Settings
from services.notifier.streams import Hub
from services.notifier.texts import Texts
from services.notifier.wakes import Wakes
from services.notifier.webhooks import Dispatcher, WebhookQueue, Webhooks
from shared import application, openapi
from shared.auth import JwksClient, TokenVerifier
from shared.clock import SystemClock
from shared.consumer import Consumer
from shared.database import Database
from shared.housekeeping import keep_tidy
from shared.limits import RateLimiter
from shared.outbox import Outbox, Relay
from shared.runner import Process, Service

NAME = "notifier"


async def api(process: Process, settings: Settings) -> web.Application:
    clock = SystemClock()
    db = await process.enter(Database.opened(NAME, settings, process.health))
    await process.background("notifier-housekeeping", partial(keep_tidy, db))
    hub = process.one(Hub)
    if settings.redis_url is not None:
        await process.background("notifier-listen", partial(wakes.listen, settings.redis_url, hub))
    await process.background("notifier-poll", partial(wakes.poll, db, hub, settings))
    inbox = Inbox(db, hub, settings.stream_heartbeat_seconds)
    outbox = Outbox(NAME, await process.enter(Relay.opened(NAME, db, await process.bus(settings))))
    campaigns = Campaigns(db, outbox, clock)
    texts = Texts(settings.public_url)
    table = routes(Handlers(inbox, Webhooks(db, settings), campaigns, texts, clock, settings.stream_write_seconds))
    app = application.build(
        NAME,
        table,
        TokenVerifier(JwksClient(settings.jwks_url, process.http), clock),
        settings,
        documentation=lambda: openapi.document("Notifier", "1", table),
    )

    async def end_streams(_app: web.Application) -> None:
        hub.close()  # else they would hold up the stop until they are cut

    app.on_shutdown.append(end_streams)
    return app


async def worker(process: Process, settings: Settings) -> None:
    db = await process.enter(Database.opened(NAME, settings, process.health))
    bus = await process.bus(settings)
    clock = SystemClock()
    texts = Texts(settings.public_url)
    composer = Composer(settings.mail_from, clock)
    smtp = Smtp(
        settings.smtp_url,
        settings.smtp_command_seconds,
        settings.smtp_data_seconds,
        settings.smtp_messages_per_connection,
        settings.smtp_idle_seconds,
    )
    outbox = Outbox(NAME, await process.enter(Relay.opened(NAME, db, bus)))
    redis = await process.redis(settings.redis_url)
    await process.enter(smtp.opened())
    sender = Sender(db, smtp, composer, texts, RateLimiter(redis), settings)
    await process.enter(sender.running())
    announcements = await process.enter(Wakes.opened(process.one(Hub), redis))
    client = await process.enter(WebhookClient.opened(settings.webhook_timeout_seconds, settings.private_networks()))
    outgoing = WebhookQueue(clock)
    notifier = Notifier(texts, announcements, sender.wake, composer.domain, outgoing.add)
    dispatcher = Dispatcher(db, client, outgoing, settings, clock, notifier.tell_webhook_disabled)
    await process.enter(dispatcher.running())
    await process.background("notifier-clean-up", partial(clean_up.keep_cleaning, db, settings))
    consumer = Consumer(
        NAME,
        consumers(notifier, Preparation(outbox, composer.domain)),
        db,
        settings.event_retry_delays_seconds,
        settings.event_handler_seconds,
    )
    await process.enter(bus.consuming(consumer, settings.consumer_concurrency))


SERVICE = Service(
    NAME, Settings, api, worker=worker, migrations=Path(__file__).parent / "migrations", commands=COMMANDS
)
