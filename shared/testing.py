"""For tests: conditions with a deadline instead of sleeps, and a clock that stands still until it is moved."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from typing import TypeVar

T = TypeVar("T")


class FixedClock:
    def __init__(self, at: datetime | None = None) -> None:
        self._now = at or datetime(2030, 1, 1, tzinfo=UTC)

    def now(self) -> datetime:
        return self._now

    def move(self, seconds: float) -> None:
        self._now += timedelta(seconds=seconds)


class Ticks:
    """In place of `time.monotonic`: seconds that pass when they are told to."""

    def __init__(self) -> None:
        self._now = 1000.0

    def __call__(self) -> float:
        return self._now

    def move(self, seconds: float) -> None:
        self._now += seconds


async def eventually(ask: Callable[[], Awaitable[T]], *, within: float = 15.0, every: float = 0.05) -> T:
    """The first truthy answer of `ask`. Fails with the last answer or error when there is none in `within` seconds."""
    until = time.monotonic() + within
    while True:
        try:
            answer = await ask()
            if answer:
                return answer
            last: object = answer
        except AssertionError as error:
            last = error
        if time.monotonic() > until:
            raise AssertionError(f"not within {within} s; last: {last!r}")
        await asyncio.sleep(every)
