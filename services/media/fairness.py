"""Turns by owner: who has a thousand images in the queue is served as often as who has one."""

import asyncio
from collections import OrderedDict, deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from uuid import UUID


class FairGate:
    """Lets `places` in at a time. A place that becomes free goes to the owners in turn, to each one's first come.

    It is fair among those who wait at it: the consumer must have many more events in hand than there are places.
    """

    def __init__(self, places: int) -> None:
        self._free = places
        self._waiting: OrderedDict[UUID, deque[asyncio.Future[None]]] = OrderedDict()

    @asynccontextmanager
    async def turn(self, owner_id: UUID) -> AsyncIterator[None]:
        await self._enter(owner_id)
        try:
            yield
        finally:
            self._leave()

    async def _enter(self, owner_id: UUID) -> None:
        if self._free:  # then nobody waits
            self._free -= 1
            return
        called: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(owner_id, deque()).append(called)
        try:
            await called
        except asyncio.CancelledError:
            if called.done() and not called.cancelled():
                self._leave()  # called and cancelled at once: the next one's
            raise

    def _leave(self) -> None:
        while self._waiting:
            owner_id, queue = self._waiting.popitem(last=False)
            called = queue.popleft()
            if queue:
                self._waiting[owner_id] = queue  # behind the others
            if not called.done():
                called.set_result(None)
                return
        self._free += 1
