"""Reads by key that are asked for at the same time become one query: `WHERE id = ANY ($1)`.

Under load one or two connections then answer more than a pool of twenty (docs/adr/0014), for most of a short query's
cost is in the exchange and not in the row.

    self._profiles = Loader(db, repository.get_profiles)
    profile = await self._profiles.get(account_id)
"""

import asyncio
from collections.abc import Awaitable, Callable, Hashable, Mapping, Sequence
from contextvars import Context
from typing import Generic, TypeVar

from shared import consistency
from shared.consistency import Positions
from shared.database import Connection, Database
from shared.errors import TenfoldError

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")
Query = Callable[[Connection, Sequence[K]], Awaitable[Mapping[K, V]]]

_LARGEST = 500
_AT_ONCE = 2


class Loader(Generic[K, V]):
    """`query` answers the rows of some keys, each under its key, and leaves out what does not exist.

    What is asked for in one turn of the event loop goes out together, and so does what is asked for while two queries
    are under way. A batch runs where the row is as new as the most demanding of its callers needs it.
    """

    def __init__(self, db: Database, query: Query[K, V]) -> None:
        self._db = db
        self._query = query
        self._asked: dict[K, list[asyncio.Future[V | None]]] = {}
        self._needed = Positions()
        self._scheduled = False
        self._running: set[asyncio.Task[None]] = set()

    async def get(self, key: K) -> V | None:
        """The row of `key`, or `None`; raises what `Database.read` does.

        A caller's deadline or cancellation is its own: the others still get their rows.
        """
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[V | None] = loop.create_future()
        self._asked.setdefault(key, []).append(answer)
        if consistency.is_tracked():
            self._needed.merge(consistency.current())
        if not self._scheduled and len(self._running) < _AT_ONCE:
            self._scheduled = True
            loop.call_soon(self._send)
        return await answer

    def _send(self) -> None:
        self._scheduled = False
        while self._asked and len(self._running) < _AT_ONCE:
            keys = list(self._asked)[:_LARGEST]
            batch = {key: self._asked.pop(key) for key in keys}
            needed = self._needed
            if not self._asked:
                self._needed = Positions()
            # Nobody's context: neither the deadline nor the trace of one caller is the others'.
            task = asyncio.create_task(self._run(batch, needed), context=Context())
            self._running.add(task)
            task.add_done_callback(self._ended)

    def _ended(self, task: "asyncio.Task[None]") -> None:
        self._running.discard(task)
        self._send()

    async def _run(self, batch: dict[K, list["asyncio.Future[V | None]"]], needed: Positions) -> None:
        with consistency.tracked(None) as positions:
            positions.merge(needed)
            try:
                rows = await self._db.read(self._query, list(batch))
            except BaseException as error:  # noqa: BLE001 - it is the callers'
                if len(batch) == 1 or isinstance(error, TenfoldError) or not isinstance(error, Exception):
                    for answers in batch.values():
                        _refuse(answers, error)
                    return
                # One caller's key that cannot be asked for must not fail the others.
                for key, answers in batch.items():
                    await self._run({key: answers}, needed)
                return
        for key, answers in batch.items():
            row = rows.get(key)
            for answer in answers:
                if not answer.done():
                    answer.set_result(row)


def _refuse(answers: Sequence["asyncio.Future[V | None]"], error: BaseException) -> None:
    for answer in answers:
        if isinstance(error, asyncio.CancelledError):
            answer.cancel()
        elif not answer.done():
            answer.set_exception(error)
