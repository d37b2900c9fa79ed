"""The composition root of users: builds every object once; the only place that knows all."""

from functools import partial
from pathlib import Path

from aiohttp import web

from services.users import repository
from services.users.handlers import Handlers
from services.users.keys import SigningKeys
from services.users.models import Profile
from services.users.passwords import Passwords
from services.users.routes import routes
from services.users.service import Users
from services.users.settings import Settings
from shared import application, openapi
from shared.auth import TokenVerifier
from shared.cache import Cache
from shared.clock import SystemClock
from shared.database import Database
from shared.housekeeping import keep_tidy
from shared.outbox import Outbox, Relay
from shared.runner import Process, Service

NAME = "users"


async def api(process: Process, settings: Settings) -> web.Application:
    clock = SystemClock()
    db = await process.enter(Database.opened(NAME, settings, process.health, repository.CONSTRAINTS))
    await process.background("users-housekeeping", partial(keep_tidy, db))
    redis = await process.redis(settings.redis_url)
    outbox = Outbox(NAME, await process.enter(Relay.opened(NAME, db, await process.bus(settings))))
    passwords = await process.enter(Passwords.opened(settings))
    keys = await process.enter(SigningKeys.opened(db, settings.signing_key_secret, clock))
    profiles = await process.enter(Cache.opened("profile", Profile, lambda profile: profile.version, redis))
    users = Users(db, outbox, passwords, keys, profiles, settings, clock)
    table = routes(Handlers(users, keys))
    return application.build(
        NAME,
        table,
        TokenVerifier(keys, clock),
        settings,
        documentation=lambda: openapi.document("Users", "1", table),
    )


SERVICE = Service(NAME, Settings, api, migrations=Path(__file__).parent / "migrations")
