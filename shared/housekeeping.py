"""What the platform's own tables forget, hourly, in every API process of a service."""

import asyncio
import random

import asyncpg

from shared import consumer, forgetting, idempotency
from shared.database import Database
from shared.errors import TenfoldError
from shared.logs import get_logger

log = get_logger()

_EVERY_SECONDS = 3600.0


async def keep_tidy(db: Database) -> None:
    """Run for ever. The instances of a service come at different times; what one forgets the others do not find."""
    while True:
        await asyncio.sleep(_EVERY_SECONDS * random.uniform(0.5, 1))  # noqa: S311 - spreading load
        try:
            log.info(
                "tidied",
                keys=await idempotency.clean_up(db),
                handled=await consumer.clean_up(db),
                failed=await consumer.clean_up_failed(db),
                forgotten=await forgetting.clean_up(db),
            )
        except (TenfoldError, asyncpg.PostgresError) as error:
            log.warning("not_tidied", error=str(error))
