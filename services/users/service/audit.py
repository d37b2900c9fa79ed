"""Noting what happened to an account, for its owner to read."""

import asyncio
from uuid import UUID

import asyncpg

from services.users.models import Client, Happening
from services.users.repository import audit as repository
from shared.database import Database, Transaction
from shared.errors import TenfoldError
from shared.ids import new_id
from shared.logs import get_logger

log = get_logger()

NOBODY = Client("", "")
_WAITING = 1000


async def note(tx: Transaction, account_id: UUID, what: Happening, client: Client = NOBODY) -> None:
    """Note it if and when `tx` commits."""
    await repository.insert_security_event(tx, new_id(), account_id, what, client)


class LateNotes:
    """For what must not take its time before the answer: a failed attempt at a known account is to look like one at
    an unknown one. What waits when a process is killed is lost."""

    def __init__(self, db: Database) -> None:
        self._db = db
        self._waiting: asyncio.Queue[tuple[UUID, Happening, Client]] = asyncio.Queue(_WAITING)

    def add(self, account_id: UUID, what: Happening, client: Client) -> None:
        if not self._waiting.full():
            self._waiting.put_nowait((account_id, what, client))

    async def keep_writing(self) -> None:
        """For ever."""
        while True:
            first = await self._waiting.get()
            # Apart from the request it came from, and several in one transaction.
            await asyncio.sleep(0.1)
            rest = [self._waiting.get_nowait() for _ in range(self._waiting.qsize())]
            try:
                async with self._db.transaction() as tx:
                    for account_id, what, client in (first, *rest):
                        await note(tx, account_id, what, client)
            except (TenfoldError, asyncpg.PostgresError) as error:
                log.warning("security_events_lost", count=1 + len(rest), error=str(error))
