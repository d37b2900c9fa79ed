"""Which streams are open in this process, and how they learn that there is something new.

What is new is in the database; a wake says only for whom, and up to where. Wakes come directly within a process,
through Redis from others, and from polling the positions of all users with open streams (one query), which makes up
for every wake that was lost.
"""

import asyncio
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from uuid import UUID

from services.notifier.errors import TooManyStreams

MAX_STREAMS_A_USER = 20
_RETRY_AFTER_SECONDS = 10


class Watch:
    """One open stream. `position` is how far it has come; who follows it keeps that up to date."""

    def __init__(self, position: int) -> None:
        self.position = position
        self.closed = False
        self._woken = asyncio.Event()
        self._woken.set()  # look once before waiting: what came before this watch was not heard

    def hear(self, position: int) -> None:
        if position > self.position:
            self._woken.set()

    def look_again(self) -> None:
        self._woken.set()

    def close(self) -> None:
        self.closed = True
        self._woken.set()

    async def wait(self, seconds: float) -> bool:
        """Wait until there may be something new or the watch is closed; false if `seconds` pass before."""
        try:
            async with asyncio.timeout(seconds):
                await self._woken.wait()
        except TimeoutError:
            return False
        self._woken.clear()  # before the caller looks, so that what comes meanwhile is seen the next time
        return True


class Hub:
    def __init__(self) -> None:
        self._watches: dict[UUID, set[Watch]] = {}
        self._closed = False
        self.hears_others = False  # whether wakes of other processes come in at the moment

    @contextmanager
    def watch(self, user_id: UUID, position: int) -> Iterator[Watch]:
        """Raises `TooManyStreams`."""
        watches = self._watches.setdefault(user_id, set())
        if len(watches) >= MAX_STREAMS_A_USER:
            raise TooManyStreams(_RETRY_AFTER_SECONDS)
        watch = Watch(position)
        watches.add(watch)
        if self._closed:
            watch.close()
        try:
            yield watch
        finally:
            watches.discard(watch)
            if not watches:
                self._watches.pop(user_id, None)

    def wake(self, positions: Mapping[UUID, int]) -> None:
        """The streams of these users have come to these positions."""
        for user_id, position in positions.items():
            for watch in self._watches.get(user_id, ()):
                watch.hear(position)

    def users(self) -> list[UUID]:
        return list(self._watches)

    def close(self) -> None:
        """End every stream, now and from now on: the process stops."""
        self._closed = True
        for watches in self._watches.values():
            for watch in watches:
                watch.close()
