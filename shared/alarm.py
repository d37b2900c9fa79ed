"""A time-out that is set again and again at almost no cost."""

import asyncio
from collections.abc import Awaitable
from typing import Any, TypeVar

T = TypeVar("T")

_NEVER = float("inf")


class Alarm:
    """Cancels a task when its time is up. To put it off, or turn it off, costs no timer: the one that runs looks, when
    it fires, how long there is still to wait. `asyncio.timeout` makes one each time, which costs more than a short
    query (docs/adr/0033).

    `within` bounds one piece of work. Who needs more than that sets it, turns it off, and asks `rang` when it catches a
    `CancelledError`.
    """

    __slots__ = ("_at", "_cancelling", "_fires_at", "_loop", "_rang", "_timer", "task")

    def __init__(self, loop: asyncio.AbstractEventLoop, task: "asyncio.Task[Any] | None" = None) -> None:
        self.task = task
        self._loop = loop
        self._at = _NEVER
        self._fires_at = _NEVER
        self._timer: asyncio.TimerHandle | None = None
        self._rang = False
        self._cancelling = 0

    async def within(self, seconds: float, work: Awaitable[T]) -> T:
        """What `work` answers, in the task of who asks; raises `TimeoutError` when it takes longer."""
        self.task = asyncio.current_task()
        self.set(seconds)
        try:
            return await work
        except asyncio.CancelledError:
            if not self.rang():
                raise
            raise TimeoutError(f"it took longer than {seconds:g} s") from None
        finally:
            self.off()

    def set(self, seconds: float) -> None:
        """From now on, `seconds` are left."""
        self._at = at = self._loop.time() + seconds
        self._cancelling = self.task.cancelling() if self.task is not None else 0
        if at < self._fires_at:
            if self._timer is not None:
                self._timer.cancel()
            self._start(at)

    def off(self) -> None:
        self._at = _NEVER
        if self._rang and self.task is not None:  # it met another error on its way
            self._rang = False
            self.task.uncancel()

    @property
    def ringing(self) -> bool:
        """Whether a cancellation that is under way is the alarm's."""
        return self._rang

    def rang(self) -> bool:
        """Whether a cancellation that was just caught is the alarm's, and only that; it then is undone."""
        rang, self._rang = self._rang, False
        return rang and self.task is not None and self.task.uncancel() <= self._cancelling

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _start(self, at: float) -> None:
        self._fires_at = at
        self._timer = self._loop.call_at(at, self._fire)

    def _fire(self) -> None:
        self._timer, self._fires_at = None, _NEVER
        if self._at == _NEVER or self.task is None:
            return
        if self._loop.time() < self._at:
            self._start(self._at)
            return
        self._at, self._rang = _NEVER, True
        self.task.cancel()
