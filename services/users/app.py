"""The composition root of users: builds every object once; the only place that knows all."""

from functools import partial
from pathlib import Path

from aiohttp import web

from services.users import tidying
from services.users.commands import COMMANDS
from services.users.handlers import Handlers
from services.users.keys import SigningKeys
from services.users.models import Profile
from services.users.passwords import Passwords
from services.users.repository.accounts import CONSTRAINTS
from services.users.routes import routes
from services.users.service.accounts import Accounts
from services.users.service.administration import Administration
from services.users.service.audit import LateNotes
from services.users.service.credentials import Credentials
from services.users.service.links import Links
from services.users.service.sessions import Sessions
from services.users.settings import Settings
from services.users.throttle import Throttle
from shared import application, openapi
from shared.auth import TokenVerifier
from shared.cache import Cache, keep_healing
from shared.clock import SystemClock
from shared.database import Database
from shared.housekeeping import keep_tidy
from shared.outbox import Outbox, Relay
from shared.runner import Process, Service

NAME = "users"


async def api(process: Process, settings: Settings) -> web.Application:
    clock = SystemClock()
    db = await process.enter(Database.opened(NAME, settings, process.health, CONSTRAINTS))
    await process.background("users-housekeeping", partial(keep_tidy, db))
    await process.background("users-tidying", partial(tidying.keep_tidy, db))
    redis = await process.redis(settings.redis_url)
    if redis is not None:
        await process.background("users-cache", partial(keep_healing, db, redis))
    outbox = Outbox(NAME, await process.enter(Relay.opened(NAME, db, await process.bus(settings))))
    passwords = await process.enter(Passwords.opened(settings))
    keys = await process.enter(SigningKeys.opened(db, settings, clock))
    profiles = await process.enter(Cache.opened("profile", Profile, lambda profile: profile.version, redis))
    links, throttle, late_notes = Links(settings), Throttle(redis, settings), LateNotes(db)
    accounts = Accounts(db, outbox, passwords, profiles, links, throttle)
    sessions = Sessions(db, passwords, keys, throttle, late_notes, settings, clock)
    credentials = Credentials(db, outbox, passwords, profiles, links, throttle)
    administration = Administration(db, outbox, passwords, profiles, links)
    await process.background("users-keys", keys.keep_rotating)
    await process.background("users-late-notes", late_notes.keep_writing)
    await process.background("users-resets", credentials.keep_sending_resets)
    table = routes(Handlers(accounts, sessions, credentials, administration, keys))
    return application.build(
        NAME,
        table,
        TokenVerifier(keys, clock),
        settings,
        documentation=lambda: openapi.document("Users", "1", table),
    )


SERVICE = Service(NAME, Settings, api, migrations=Path(__file__).parent / "migrations", commands=COMMANDS)
