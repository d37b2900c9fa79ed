"""What users forgets by itself, hourly, in every API process."""

import asyncio
import random

import asyncpg

from services.users.repository import audit, links, sessions
from shared.database import Database
from shared.errors import TenfoldError
from shared.logs import get_logger

log = get_logger()

_EVERY_SECONDS = 3600.0


async def keep_tidy(db: Database) -> None:
    """Expired sessions and links, and security events that are old; for ever."""
    while True:
        await asyncio.sleep(_EVERY_SECONDS * random.uniform(0.5, 1))  # noqa: S311 - spreading load
        try:
            async with db.transaction() as tx:
                await sessions.delete_expired_sessions(tx)
                await links.delete_expired_tokens(tx)
                await audit.delete_old_security_events(tx)
        except (TenfoldError, asyncpg.PostgresError) as error:
            log.warning("not_tidied", error=str(error))
