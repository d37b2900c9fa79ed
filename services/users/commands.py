"""What operators run once: `python -m services.users create-admin EMAIL`, `python -m services.users rotate-keys`."""

import asyncio
import getpass
import sys
from pathlib import Path

from services.users.keys import SigningKeys
from services.users.models import Client, Profile
from services.users.passwords import Passwords
from services.users.repository.accounts import CONSTRAINTS
from services.users.service.administration import Administration
from services.users.service.links import Links
from services.users.settings import Settings
from shared import migrate
from shared.bus import InlineBus
from shared.cache import Cache
from shared.clock import SystemClock
from shared.database import Database
from shared.outbox import Outbox, Relay
from shared.runner import Command, Process

NAME = "users"
_MIGRATIONS = Path(__file__).parent / "migrations"


async def create_admin(process: Process, settings: Settings, email: str) -> int:
    """Makes an administrator, or makes one of who has an account. The password of a new one, or of one whose address
    is not proven, is read from the terminal, or the first line of standard input."""
    db = await _database(process, settings)
    outbox = Outbox(NAME, Relay(NAME, db, InlineBus()))  # never opened: the relays of the API find the rows
    passwords = await process.enter(Passwords.opened(settings))
    profiles = Cache("profile", Profile, lambda profile: profile.version, await process.redis(settings.redis_url))
    administration = Administration(db, outbox, passwords, profiles, Links(settings))
    account, made = await administration.create(email, _ask_password, Client("create-admin", ""))
    print(f"{account.email} is {'made' if made else 'promoted'}: {account.id}")  # noqa: T201
    return 0


async def rotate_keys(process: Process, settings: Settings) -> int:
    """Publishes a new signing key, which signs as soon as everybody can know it."""
    db = await _database(process, settings)
    keys = await process.enter(SigningKeys.opened(db, settings, SystemClock()))
    newest = await keys.rotate()
    print(f"{newest.id} signs from {newest.active_from.isoformat(timespec='seconds')} on")  # noqa: T201
    return 0


COMMANDS = {"create-admin": Command(create_admin, ("EMAIL",)), "rotate-keys": Command(rotate_keys)}


async def _database(process: Process, settings: Settings) -> Database:
    await migrate.require_current(settings.database_url, NAME, _MIGRATIONS)
    return await process.enter(Database.opened(NAME, settings, process.health, CONSTRAINTS))


async def _ask_password() -> str:
    if sys.stdin.isatty():
        return await asyncio.to_thread(getpass.getpass, "New password of the administrator: ")
    line: str = await asyncio.to_thread(sys.stdin.readline)
    return line.rstrip("\r\n")
