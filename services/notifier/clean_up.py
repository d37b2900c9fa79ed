"""What notifier lets go of in time: old stream entries, emails, deliveries; and campaigns that are over.

In batches, each a short transaction, so nobody waits long for a lock and no replica falls behind.
"""

import asyncio
from collections.abc import Awaitable, Callable

from services.notifier import campaign_repository, email_repository, repository, webhook_repository
from services.notifier.settings import Settings
from shared.database import Database, Transaction
from shared.errors import TenfoldError
from shared.logs import get_logger

log = get_logger()

_EVERY_SECONDS = 60.0
_BATCH = 1000
_CAMPAIGNS = 10


async def keep_cleaning(db: Database, settings: Settings) -> None:
    """For ever. Any number may run; what one has in hand the others pass over."""
    while True:
        try:
            await clean_up(db, settings)
        except TenfoldError as error:
            log.warning("not_cleaned_up", error=str(error))
        except Exception:
            log.exception("not_cleaned_up")
        await asyncio.sleep(_EVERY_SECONDS)


async def clean_up(db: Database, settings: Settings) -> None:
    async def stream_entries(tx: Transaction) -> int:
        return await repository.delete_old_stream_entries(tx, settings.stream_kept_seconds, _BATCH)

    async def emails(tx: Transaction) -> int:
        return await email_repository.delete_old_emails(tx, settings.log_kept_seconds, _BATCH)

    async def deliveries(tx: Transaction) -> int:
        return await webhook_repository.delete_old_deliveries(tx, settings.log_kept_seconds, _BATCH)

    async def campaigns(tx: Transaction) -> int:
        return await campaign_repository.finish_campaigns(tx, _CAMPAIGNS)

    await _in_batches(db, campaigns, _CAMPAIGNS)
    for work in (stream_entries, emails, deliveries):
        await _in_batches(db, work, _BATCH)


async def _in_batches(db: Database, work: Callable[[Transaction], Awaitable[int]], batch: int) -> None:
    done = batch
    while done == batch:
        async with db.transaction() as tx:
            done = await work(tx)
