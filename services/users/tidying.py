"""What users forgets by itself, hourly, in every API process."""

import asyncio
import random

import asyncpg

from shared.database import Database
from shared.errors import TenfoldError
from shared.logs import get_logger
from shared.sweeping import sweep

log = get_logger()

_EVERY_SECONDS = 3600.0
_SECURITY_EVENTS_KEPT = "180 days"


async def keep_tidy(db: Database) -> None:
    """Expired sessions and links, and security events that are old; for ever."""
    while True:
        await asyncio.sleep(_EVERY_SECONDS * random.uniform(0.5, 1))  # noqa: S311 - spreading load
        try:
            log.info(
                "accounts_tidied",
                # Few at a time: each takes the refresh tokens that it has spent along.
                sessions=await sweep(db, "sessions", "expires_at", batch=20),
                links=await sweep(db, "one_time_tokens", "expires_at"),
                security_events=await sweep(db, "security_events", "created_at", _SECURITY_EVENTS_KEPT),
            )
        except (TenfoldError, asyncpg.PostgresError) as error:
            log.warning("not_tidied", error=str(error))
