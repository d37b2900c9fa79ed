"""A circuit breaker: a service of which half the requests fail is left alone for a while.

Without it each request would wait for its timeout, hold a connection meanwhile, and be one more for a service that has
to recover. Instances are judged one by one elsewhere (`instances`); this is about all of them together.
"""

import random
import time
from collections.abc import Callable

_WINDOW_SECONDS = 10.0
_LEAST_FAILURES = 10
_SHORTEST_SECONDS = 1.0
_LONGEST_SECONDS = 5.0  # one request a time does no harm, and who is back is found soon


class CircuitBreaker:
    """Closed: everything passes. Open: nothing does, for longer each time. Then one request passes, and its outcome
    decides; should it have none (the caller went away), another one passes a second later.

    `passes` and `succeeded` are on the way of every request: while it is closed they cost a comparison and a count.
    """

    def __init__(self, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._monotonic = monotonic
        self._calls = 0
        self._failures = 0
        self._window_from = 0.0
        self._opened = 0  # times in a row
        self._until = 0.0
        self._probing = False

    @property
    def is_open(self) -> bool:
        return self._opened > 0

    def passes(self) -> bool:
        """Whether a request may be made now."""
        if not self._opened:
            return True
        now = self._monotonic()
        if now < self._until:
            return False
        self._probing, self._until = True, now + _SHORTEST_SECONDS
        return True

    def retry_after(self) -> float:
        """Seconds until it is worth asking again."""
        return max(0.0, self._until - self._monotonic())

    def succeeded(self) -> None:
        """The service answered."""
        if self._opened:
            self._opened = self._calls = self._failures = 0
        self._calls += 1

    def failed(self) -> None:
        """It gave no answer, or not in time."""
        now = self._monotonic()
        if self._opened:
            if self._probing:  # else it was asked before we opened, and says nothing new
                self._open(now)
            return
        # A window begins with its first failure, so that success needs no look at the clock.
        if now - self._window_from > _WINDOW_SECONDS:
            self._window_from, self._calls, self._failures = now, 0, 0
        self._calls += 1
        self._failures += 1
        if self._failures >= _LEAST_FAILURES and self._failures * 2 >= self._calls:
            self._open(now)

    def _open(self, now: float) -> None:
        self._opened += 1
        self._probing = False
        seconds = min(_SHORTEST_SECONDS * 2 ** min(self._opened - 1, 10), _LONGEST_SECONDS)
        self._until = now + seconds * random.uniform(0.8, 1.2)  # noqa: S311 - not all callers are to ask at once
