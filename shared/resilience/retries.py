"""A budget for retries, so that they never become the load."""

import time
from collections.abc import Callable

_A_CALL = 0.2
_A_SECOND = 3.0
_AT_ONCE = 10.0


class RetryBudget:
    """How many calls may be tried again: a fifth of them and a few a second."""

    def __init__(self, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._monotonic = monotonic
        self._left = _AT_ONCE
        self._filled_at = monotonic()

    def called(self) -> None:
        if self._left < _AT_ONCE:
            self._left = min(_AT_ONCE, self._left + _A_CALL)

    def granted(self) -> bool:
        """Whether one more try may be made; counts it."""
        now = self._monotonic()
        self._left = min(_AT_ONCE, self._left + (now - self._filled_at) * _A_SECOND)
        self._filled_at = now
        if self._left < 1:
            return False
        self._left -= 1
        return True
