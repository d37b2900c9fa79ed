"""A bounded pool of connections that costs a call nothing while one is free: no task, no proxy, no timer.

The driver's own pool takes longer than a short query (docs/adr/0033). Nothing is reset between two users, for no
session state is used; who gives a connection back says that it is at rest, or has it set right first (`server.py`).
"""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from functools import partial
from typing import Any

import asyncpg

_CLOSE_SECONDS = 0.5
_LOOK_SECONDS = 60.0
# The server's memory for a connection grows with what was asked over it.
_LIFETIME_SECONDS = 1800.0


# What using a connection can end with. The driver says `InternalClientError` when the server's last words came between
# two statements: it is surprised, and closes the connection.
FAILURES = (OSError, asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError)


class Slot:
    """Room for one connection, and the connection that is in it, if any."""

    __slots__ = ("connection", "opened_at", "outdated", "used")

    def __init__(self) -> None:
        self.connection: Any = None
        self.opened_at = 0.0
        self.outdated = False
        self.used = False

    def is_open(self) -> bool:
        return self.connection is not None and not self.connection.is_closed()


class Pool:
    """At most `size` connections, opened by `connect` when they are first needed; unused for a minute or two, one is
    closed. Whoever waits is served in order."""

    def __init__(self, connect: Callable[[], Awaitable[Any]], size: int) -> None:
        self.in_use = 0
        self._connect = connect
        self._slots = [Slot() for _ in range(size)]
        # Those with a connection come last, and of them the one used last: the others can be idle for long.
        self._free = list(self._slots)
        self._waiting: deque[asyncio.Future[Slot]] = deque()
        self._behind: set[asyncio.Task[None]] = set()
        self._look: asyncio.TimerHandle | None = None
        self._closing: asyncio.Event | None = None

    @property
    def size(self) -> int:
        """How many connections are open."""
        return sum(slot.connection is not None for slot in self._slots)

    @property
    def is_exhausted(self) -> bool:
        return self.in_use == len(self._slots)

    def take(self) -> Slot | None:
        """A slot with an open connection, if one is free at once."""
        if not self._free or not self._free[-1].is_open():
            return None
        self.in_use += 1
        slot = self._free.pop()
        slot.used = True
        return slot

    async def acquire(self) -> Slot:
        """A slot with an open connection, as soon as there is one; raises what `connect` does.

        Waits without a bound of its own, and may be cancelled at any time. `connect` has to end by itself.
        """
        if self._closing is not None:
            raise asyncpg.InterfaceError("the pool is closed")
        slot = self._free.pop() if self._free else await self._turn()
        if not slot.is_open():
            opening = asyncio.create_task(self._open(slot))
            self._behind.add(opening)
            opening.add_done_callback(self._behind.discard)
            try:
                await asyncio.shield(opening)
            except asyncio.CancelledError:
                # It goes on for whoever comes next: under load, else, every caller would begin anew and none arrive.
                opening.add_done_callback(partial(self._opened_for_nobody, slot))
                raise
            except BaseException:
                self._put(slot)
                raise
        self.in_use += 1
        slot.used = True
        return slot

    async def _open(self, slot: Slot) -> None:
        slot.connection = None
        slot.connection = await self._connect()
        slot.opened_at, slot.outdated = asyncio.get_running_loop().time(), False

    def _opened_for_nobody(self, slot: Slot, opening: "asyncio.Task[None]") -> None:
        if not opening.cancelled():
            opening.exception()  # whoever comes next meets it again
        self._put(slot)

    async def _turn(self) -> Slot:
        turn: asyncio.Future[Slot] = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        try:
            return await turn
        except asyncio.CancelledError:
            if turn.cancelled():
                with suppress(ValueError):
                    self._waiting.remove(turn)
            else:
                self._put(turn.result())  # its turn came at that very moment
            raise

    def give_back(self, slot: Slot) -> None:
        """The connection is at rest. One that is in a transaction all the same is closed."""
        self.in_use -= 1
        connection = slot.connection
        if connection.is_closed():
            slot.connection = None
            self._put(slot)
        elif slot.outdated or connection.is_in_transaction():
            self.run_behind(self._close(slot))
        else:
            self._put(slot)

    def _put(self, slot: Slot) -> None:
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(slot)
                return
        if slot.connection is None:
            self._free.insert(0, slot)
        else:
            self._free.append(slot)
            if self._look is None and self._closing is None:
                self._look = asyncio.get_running_loop().call_later(_LOOK_SECONDS, self._close_unused)
        if self._closing is not None and len(self._free) == len(self._slots):
            self._closing.set()

    def run_behind(self, work: Coroutine[Any, Any, None]) -> "asyncio.Task[None]":
        """Run `work`, which raises nothing, behind its caller's back; `close` waits for it."""
        task = asyncio.create_task(work)
        self._behind.add(task)
        task.add_done_callback(self._behind.discard)
        return task

    def expire(self) -> None:
        """Replace all connections: those that are free now, and the others when they come back."""
        for slot in self._slots:
            slot.outdated = True
        self._close_free(lambda _: True)

    def _close_unused(self) -> None:
        self._look = None
        too_old = asyncio.get_running_loop().time() - _LIFETIME_SECONDS
        for slot in self._slots:
            slot.outdated |= slot.opened_at < too_old
        self._close_free(lambda slot: slot.outdated or not slot.used)
        for slot in self._slots:
            slot.used = False
        if self._look is None and self.size:
            self._look = asyncio.get_running_loop().call_later(_LOOK_SECONDS, self._close_unused)

    def _close_free(self, which: Callable[[Slot], bool]) -> None:
        for slot in [slot for slot in self._free if slot.connection is not None and which(slot)]:
            self._free.remove(slot)
            self.run_behind(self._close(slot))

    async def _close(self, slot: Slot) -> None:
        """The slot is free only then: never are more connections open than there are slots."""
        try:
            await cut(slot.connection)
        finally:
            slot.connection = None
            self._put(slot)

    async def close(self, seconds: float) -> None:
        """Close every connection once it has come back; in `seconds` cut what has not."""
        self._closing = asyncio.Event()
        if self._look is not None:
            self._look.cancel()
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                if len(self._free) < len(self._slots):
                    await self._closing.wait()
                await asyncio.gather(*(cut(slot.connection) for slot in self._slots if slot.connection is not None))
        for slot in self._slots:
            if slot.is_open():
                slot.connection.terminate()
        for task in self._behind:
            task.cancel()
        await asyncio.gather(*self._behind, return_exceptions=True)


async def cut(connection: Any) -> None:
    """Close a connection, in order if that is quick."""
    with suppress(*FAILURES):
        await connection.close(timeout=_CLOSE_SECONDS)
