"""One connection, each of whose statements ends in time."""

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, TypeVar

from shared.alarm import Alarm

T = TypeVar("T")


class Session:
    """What a pool holds: a connection of the driver with an alarm in place of the driver's `command_timeout`, which
    starts a timer for each statement.

    A statement that takes longer than `seconds` is cancelled, here and at the server, and raises `TimeoutError`.
    """

    def __init__(self, connection: Any, seconds: float) -> None:
        self._seconds = seconds
        self._alarm = Alarm(asyncio.get_running_loop())
        self.is_closed: Callable[[], bool] = connection.is_closed
        self.is_in_transaction: Callable[[], bool] = connection.is_in_transaction
        self.terminate: Callable[[], None] = connection.terminate
        self.close: Callable[..., Awaitable[None]] = connection.close
        self.fetch = partial(self._run, connection.fetch)
        self.fetchrow = partial(self._run, connection.fetchrow)
        self.fetchval = partial(self._run, connection.fetchval)
        self.execute = partial(self._run, connection.execute)
        self.executemany = partial(self._run, connection.executemany)
        # The driver's own cursors leave a statement with a name, which behind PgBouncer another client may have too.
        self._prepare = partial(connection.prepare, name="")

    async def cursor(self, sql: str, *args: object) -> "Cursor":
        """For the transaction in progress; each of its fetches is bounded as a statement is."""
        statement = await self._run(self._prepare, sql)
        return Cursor(self, await self._run(statement.cursor, *args))

    def _run(self, statement: Callable[..., Awaitable[T]], *args: object) -> Awaitable[T]:
        return self._alarm.within(self._seconds, statement(*args))


class Cursor:
    def __init__(self, session: Session, cursor: Any) -> None:
        self.fetch = partial(session._run, cursor.fetch)
