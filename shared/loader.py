"""Reads by key that are asked for at the same time become one query: `WHERE id = ANY ($1)`.

Under load one or two connections then answer more than a pool of twenty (docs/adr/0014), for most of a short query's
cost is in the exchange and not in the row.

    async def get_profiles(connection: Connection, ids: Sequence[UUID]) -> Mapping[UUID, Profile]:
        rows = await fetch_by_key(connection, "SELECT id, name FROM profiles WHERE id", "uuid", ids)
        return {row["id"]: Profile(**row) for row in rows}

    self._profiles = Loader(db, repository.get_profiles)
    profile = await self._profiles.get(account_id)
"""

import asyncio
from collections.abc import Awaitable, Callable, Hashable, Mapping, Sequence
from contextvars import Context
from itertools import islice
from typing import Any, Generic, TypeVar

from shared import consistency
from shared.consistency import Positions
from shared.database import Connection, Database, Record
from shared.errors import TenfoldError

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")
Query = Callable[[Connection, Sequence[K]], Awaitable[Mapping[K, V]]]

_LARGEST = 500
_AT_ONCE = 2


class Loader(Generic[K, V]):
    """`query` answers the rows of some keys, each under its key, and leaves out what does not exist.

    Who asks alone asks for itself at once, as if there were no loader. What else is asked for in that turn of the event
    loop goes out together, and so does what is asked for while two queries are under way. A batch runs where the row is
    as new as the most demanding of its callers needs it.
    """

    def __init__(self, db: Database, query: Query[K, V]) -> None:
        self._db = db
        self._query = query
        self._asked: dict[K, list[asyncio.Future[V | None]]] = {}
        self._needed = Positions()
        self._workers: set[asyncio.Task[None]] = set()
        self._busy = 0  # workers with a query under way; the others will see what is asked for in this turn
        self._is_one_alone = False

    async def get(self, key: K) -> V | None:
        """The row of `key`, or `None`; raises what `Database.read` does.

        A caller's deadline or cancellation is its own: the others still get their rows.
        """
        if not self._workers and not self._is_one_alone:
            self._is_one_alone = True
            try:
                return (await self._db.read(self._query, [key])).get(key)
            finally:
                self._is_one_alone = False
                self._see_to_it()
        answer: asyncio.Future[V | None] = asyncio.get_running_loop().create_future()
        if (others := self._asked.get(key)) is None:
            self._asked[key] = [answer]
        else:
            others.append(answer)
        if consistency.is_tracked():
            self._needed.merge(consistency.current())
        self._see_to_it()
        return await answer

    def _see_to_it(self) -> None:
        """Have a worker take what is asked for, unless one is about to, or there are enough."""
        if self._asked and self._busy == len(self._workers) < _AT_ONCE - self._is_one_alone:
            # Nobody's context: neither the deadline nor the trace of one caller is the others'.
            worker = asyncio.create_task(self._work(), context=Context())
            self._workers.add(worker)
            worker.add_done_callback(self._workers.discard)

    async def _work(self) -> None:
        """Ask as long as anybody wants something."""
        try:
            while self._asked:
                needed, batch = self._needed, self._take()
                self._busy += 1
                try:
                    self._see_to_it()
                    consistency.assume(needed)
                    await self._run(batch)
                except BaseException:
                    _abandon(batch)
                    raise
                finally:
                    self._busy -= 1
                await asyncio.sleep(0)  # whoever has been answered may ask on
        finally:
            self._workers.discard(asyncio.current_task())  # at once, and not in a later turn

    def _take(self) -> dict[K, list["asyncio.Future[V | None]"]]:
        if len(self._asked) > _LARGEST:
            return {key: self._asked.pop(key) for key in list(islice(self._asked, _LARGEST))}
        batch, self._asked, self._needed = self._asked, {}, Positions()
        return batch

    async def _run(self, batch: dict[K, list["asyncio.Future[V | None]"]]) -> None:
        try:
            rows = await self._db.read(self._query, list(batch))
        except Exception as error:  # noqa: BLE001 - it is the callers'
            if len(batch) > 1 and not isinstance(error, TenfoldError):
                # One caller's key that cannot be asked for must not fail the others.
                for key, answers in batch.items():
                    await self._run({key: answers})
                return
            for answers in batch.values():
                for answer in answers:
                    if not answer.done():
                        answer.set_exception(error)
            return
        for key, answers in batch.items():
            row = rows.get(key)
            for answer in answers:
                if not answer.done():
                    answer.set_result(row)


def _abandon(batch: Mapping[Any, Sequence["asyncio.Future[Any]"]]) -> None:
    """Nobody waits for ever for a worker that was cancelled."""
    for answers in batch.values():
        for answer in answers:
            answer.cancel()  # where it is not done


async def fetch_by_key(connection: Connection, select: str, type_: str, keys: Sequence[object]) -> list[Record]:
    """The rows of some keys. `select` ends where the condition on the key begins ("... WHERE id"), `type_` is its type.

    A single key is asked for by itself: the server would plan a short list anew each time, which takes it longer than
    to read the row.
    """
    if len(keys) == 1:
        return await connection.fetch(f"{select} = $1", keys[0])
    return await connection.fetch(f"{select} = ANY ($1::{type_}[])", keys)
