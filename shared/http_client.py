"""Calls to other services, bounded by the caller's deadline (docs/resilience.md says what else bounds them).

The deadline travels as `Request-Timeout` (milliseconds left) and shrinks at each hop.
"""

import asyncio
import random
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

import aiohttp
import msgspec

from shared import tracing
from shared.errors import DeadlineExceeded, Unavailable
from shared.resilience import Fleet

T = TypeVar("T")

DEADLINE_HEADER = "Request-Timeout"
_ATTEMPTS = 3
_CONNECT_SECONDS = 1.0
_FIRST_DELAY_SECONDS = 0.02

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


class ServiceClient:
    """Reads from one service. Its instances, and what is known of how it fares, are those of `fleet`."""

    def __init__(self, fleet: Fleet[Any], http: aiohttp.ClientSession) -> None:
        self._fleet = fleet
        self._http = http

    async def get(self, path: str, type_: type[T], *, headers: dict[str, str], timeout: float) -> T:
        """GET `path` decoded as `type_`. Tries other instances; raises `Unavailable` or `DeadlineExceeded`."""
        fleet = self._fleet
        fleet.enter()
        began, found = fleet.take(), None
        try:
            with deadline(timeout):
                found = await self._try(path, type_, headers, timeout)
        finally:
            if found is None:
                fleet.limit.give_up(path, began)
            else:
                fleet.limit.give(path, began)
        return found

    async def _try(self, path: str, type_: type[T], headers: dict[str, str], timeout: float) -> T:
        fleet = self._fleet
        tried: list[Any] = []
        # A service is not judged by what callers do not wait for: they could have it left alone for everybody.
        hurried = remaining(timeout) < timeout * 0.9
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                left = remaining(timeout)
            except DeadlineExceeded:
                if tried:
                    fleet.breaker.failed()
                raise
            instance = fleet.instances.choose(tried) or fleet.instances.choose()
            if instance is None:
                break
            outgoing = {**headers, DEADLINE_HEADER: str(int(left * 1000))}
            if parent := tracing.traceparent():
                outgoing["traceparent"] = parent
            instance.in_flight += 1
            try:
                async with self._http.get(
                    instance.url + path, headers=outgoing, timeout=aiohttp.ClientTimeout(left, _CONNECT_SECONDS)
                ) as response:
                    raw = await response.read()
                fleet.answered(instance, response.status)
                if response.status == 200:
                    return msgspec.json.decode(raw, type=type_)
                if response.status < 500:
                    raise Unavailable(f"{fleet.name} answered {response.status}")
            except TimeoutError:
                if hurried:
                    raise DeadlineExceeded from None
                fleet.failed(instance)
            except (aiohttp.ClientError, msgspec.DecodeError):
                fleet.failed(instance)
            finally:
                instance.in_flight -= 1
            tried.append(instance)
            if attempt == _ATTEMPTS or not fleet.try_again():
                break
            await asyncio.sleep(_FIRST_DELAY_SECONDS * 2**attempt * random.random())  # noqa: S311 - jitter
        fleet.breaker.failed()
        raise Unavailable(f"{fleet.name} does not answer")
