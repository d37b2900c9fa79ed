"""Calls to other services: bounded by the caller's deadline, spread over instances, retried only where that is safe.

The deadline travels as `Request-Timeout` (milliseconds left) and shrinks at each hop.
"""

import asyncio
import itertools
import random
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from contextvars import ContextVar
from typing import TypeVar

import aiohttp
import msgspec

from shared import tracing
from shared.errors import DeadlineExceeded, Unavailable

T = TypeVar("T")

DEADLINE_HEADER = "Request-Timeout"
_ATTEMPTS = 3
_CONNECT_SECONDS = 1.0
_FIRST_DELAY_SECONDS = 0.02
_RETRIES_A_CALL = 0.2
_RETRIES_A_SECOND = 3.0
_RETRIES_AT_ONCE = 10.0

_deadline: ContextVar[float | None] = ContextVar("deadline", default=None)


@contextmanager
def deadline(seconds: float) -> Iterator[None]:
    """Everything inside has `seconds` left, or less where less was left already."""
    until = time.monotonic() + seconds
    outer = _deadline.get()
    reset = _deadline.set(until if outer is None else min(until, outer))
    try:
        yield
    finally:
        _deadline.reset(reset)


def remaining(otherwise: float) -> float:
    """Seconds left; `otherwise` where there is no deadline. Raises `DeadlineExceeded` when none is left."""
    until = _deadline.get()
    left = otherwise if until is None else min(otherwise, until - time.monotonic())
    if left <= 0:
        raise DeadlineExceeded
    return left


@asynccontextmanager
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    """The process's client session. It idles shorter than our servers do, so no call meets a closing connection."""
    connector = aiohttp.TCPConnector(limit=200, limit_per_host=100, keepalive_timeout=20)
    timeout = aiohttp.ClientTimeout(total=30, connect=_CONNECT_SECONDS)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout, auto_decompress=False) as opened:
        yield opened


class RetryBudget:
    """How many calls may be tried again: a fifth of them and a few a second, so that retries never become the load."""

    def __init__(self) -> None:
        self._left = _RETRIES_AT_ONCE
        self._filled_at = time.monotonic()

    def called(self) -> None:
        self._left = min(_RETRIES_AT_ONCE, self._left + _RETRIES_A_CALL)

    def granted(self) -> bool:
        """Whether one more try may be made; counts it."""
        now = time.monotonic()
        self._left = min(_RETRIES_AT_ONCE, self._left + (now - self._filled_at) * _RETRIES_A_SECOND)
        self._filled_at = now
        if self._left < 1:
            return False
        self._left -= 1
        return True


class ServiceClient:
    """Reads from one service, which runs at `instances` (base URLs)."""

    def __init__(self, name: str, instances: Sequence[str], http: aiohttp.ClientSession) -> None:
        self._name = name
        self._http = http
        self._retries = RetryBudget()
        self._instances = itertools.cycle(random.sample(list(instances), len(instances)))

    async def get(self, path: str, type_: type[T], *, headers: dict[str, str], timeout: float) -> T:
        """GET `path` decoded as `type_`. Tries other instances; raises `Unavailable` or `DeadlineExceeded`."""
        self._retries.called()
        with deadline(timeout):
            for attempt in range(1, _ATTEMPTS + 1):
                left = remaining(timeout)
                outgoing = {**headers, DEADLINE_HEADER: str(int(left * 1000))}
                if parent := tracing.traceparent():
                    outgoing["traceparent"] = parent
                try:
                    async with self._http.get(
                        next(self._instances) + path, headers=outgoing, timeout=aiohttp.ClientTimeout(total=left)
                    ) as response:
                        if response.status == 200:
                            return msgspec.json.decode(await response.read(), type=type_)
                        if response.status < 500:
                            raise Unavailable(f"{self._name} answered {response.status}")
                except (TimeoutError, aiohttp.ClientError, msgspec.DecodeError):
                    pass
                if attempt == _ATTEMPTS or not self._retries.granted():
                    break
                await asyncio.sleep(_FIRST_DELAY_SECONDS * 2**attempt * random.random())  # noqa: S311 - jitter
        raise Unavailable(f"{self._name} does not answer")
