"""Small writes that are asked for at the same time share a transaction, and so its flush to the disk.

For hot writes that stand alone: a read mark, a session seen, a delivery noted (docs/adr/0015).

    self._marks = GroupCommit(db, repository.mark_read, key=lambda mark: mark.notification_id)
    found = await self._marks.write(mark)
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import nullcontext
from contextvars import Context
from typing import Any, Generic, TypeVar

import asyncpg

from shared import consistency
from shared.consistency import Positions
from shared.database import Database, Transaction
from shared.errors import Unavailable

A = TypeVar("A")
R = TypeVar("R")
Write = Callable[[Transaction, Sequence[A]], Awaitable[Sequence[R]]]

_LARGEST = 200
# How long it may wait for what another transaction holds.
_TOGETHER_SECONDS = 0.1
_ALONE_SECONDS = 1.0


class GroupCommit(Generic[A, R]):
    """`write` does some writes in the transaction it gets, outbox rows included, and answers a result for each.

    Each is in effect alone: no two of a batch have the same `key`, which is what they change, so none can see or undo
    another's effect; later ones of a key come in later batches, in order. A batch is sorted by key, so that those of
    two processes do not wait for each other in a circle; `write` has to keep to that order.

    When a batch fails, nothing of it is there and each of its writes is done again in a transaction of its own, so only
    those fail that fail alone. It also fails when it waits for what another transaction holds: the one write that needs
    it then waits a second, and the others do not. A write may thus run twice and must have no effect but through its
    transaction; callbacks of `after_commit` run once, for the transaction that committed.
    """

    def __init__(self, db: Database, write: Write[A, R], key: Callable[[A], Any], at_once: int = 2) -> None:
        """`at_once` batches may run: with two a write seldom waits for one that has begun, with one batches are larger
        and fewer."""
        self._db = db
        self._write = write
        self._key = key
        self._at_once = at_once
        self._asked: list[_Asked[A, R]] = []
        self._scheduled = False
        self._running: dict[asyncio.Task[None], set[Any]] = {}

    async def write(self, argument: A) -> R:
        """The result, once it is durable; raises what `Database.transaction` does. The caller's token covers it.

        A caller that goes away before its write was begun takes it with it; later, the write is done all the same.
        """
        loop = asyncio.get_running_loop()
        asked = _Asked[A, R](argument, self._key(argument), loop.create_future())
        self._asked.append(asked)
        if not self._scheduled and len(self._running) < self._at_once:
            self._scheduled = True
            loop.call_soon(self._send)
        return await asked.result

    def _send(self) -> None:
        self._scheduled = False
        while self._asked and len(self._running) < self._at_once:
            taken = set().union(*self._running.values())
            batch: list[_Asked[A, R]] = []
            later: list[_Asked[A, R]] = []
            keys: set[Any] = set()
            for asked in self._asked:
                if asked.result.done():
                    continue
                if len(batch) == _LARGEST or asked.key in taken or asked.key in keys:
                    later.append(asked)
                    taken.add(asked.key)
                else:
                    batch.append(asked)
                    keys.add(asked.key)
            self._asked = later
            if not batch:
                return  # they wait for the batches that run
            batch.sort(key=lambda asked: asked.key)
            # Nobody's context: neither the deadline nor the trace of one caller is the others'.
            task = asyncio.create_task(self._run(batch), context=Context())
            self._running[task] = keys
            task.add_done_callback(self._ended)

    def _ended(self, task: "asyncio.Task[None]") -> None:
        del self._running[task]
        self._send()

    async def _run(self, batch: "list[_Asked[A, R]]") -> None:
        try:
            results, positions = await self._commit(batch)
        except BaseException as error:  # noqa: BLE001 - it is the callers'
            if len(batch) == 1 and isinstance(error, asyncpg.LockNotAvailableError):
                error = Unavailable("another transaction holds what this changes")
            # Of a server that is away nobody need ask again; what it did is unknown, too.
            if len(batch) == 1 or isinstance(error, Unavailable) or not isinstance(error, Exception):
                for asked in batch:
                    asked.refuse(error)
                return
            for asked in batch:
                await self._run([asked])
            return
        for asked, result in zip(batch, results, strict=True):
            if asked.positions is not None:
                asked.positions.merge(positions)
            if not asked.result.done():
                asked.result.set_result(result)

    async def _commit(self, batch: "list[_Asked[A, R]]") -> tuple[Sequence[R], Positions]:
        arguments = [asked.argument for asked in batch]
        asked_for = any(asked.positions is not None for asked in batch)
        wait = _ALONE_SECONDS if len(batch) == 1 else _TOGETHER_SECONDS
        with consistency.tracked(None) if asked_for else nullcontext(Positions()) as positions:
            async with self._db.transaction(lock_seconds=wait) as tx:
                results = await self._write(tx, arguments)
                if len(results) != len(batch):
                    raise TypeError("a result for each write is needed")
        return results, positions


class _Asked(Generic[A, R]):
    __slots__ = ("argument", "key", "positions", "result")

    def __init__(self, argument: A, key: Any, result: "asyncio.Future[R]") -> None:
        self.argument = argument
        self.key = key
        self.result = result
        self.positions = consistency.current() if consistency.is_tracked() else None

    def refuse(self, error: BaseException) -> None:
        if isinstance(error, asyncio.CancelledError):
            self.result.cancel()
        elif not self.result.done():
            self.result.set_exception(error)
