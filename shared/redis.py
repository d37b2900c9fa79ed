"""Redis behind short timeouts and a breaker: slow or gone, it costs a request some 50 ms once, and then nothing.

Redis holds nothing that cannot be had again, so every caller has a way to go on without it.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any, TypeVar

import redis.asyncio
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from shared import metrics
from shared.logs import get_logger

T = TypeVar("T")
log = get_logger()

_CALL_SECONDS = 0.05
_CONNECTIONS = 20
_SHORTEST_OPEN_SECONDS = 1.0
_LONGEST_OPEN_SECONDS = 10.0

FAILURES = metrics.Counter("tenfold_redis_failures_total", "Calls to Redis that failed or were not tried")


class RedisAway(Exception):
    """Redis did not answer in time, or has just not and is not asked."""


class Redis:
    def __init__(self, client: Any) -> None:
        self.client = client
        self._closed_at = float("-inf")
        self._open_seconds = _SHORTEST_OPEN_SECONDS

    @classmethod
    @asynccontextmanager
    async def opened(cls, url: str) -> "AsyncIterator[Redis]":
        """Does not connect yet: a process starts without its Redis."""
        pool = redis.asyncio.BlockingConnectionPool.from_url(
            url,
            max_connections=_CONNECTIONS,
            timeout=_CALL_SECONDS,
            socket_timeout=_CALL_SECONDS,
            socket_connect_timeout=_CALL_SECONDS,
            retry=Retry(NoBackoff(), 0),
            protocol=3,
            # Its handshake for maintenance notices costs a round trip on servers that have none.
            lib_name=None,
            lib_version=None,
        )
        client = redis.asyncio.Redis(connection_pool=pool)
        try:
            yield cls(client)
        finally:
            with suppress(RedisError, OSError, TimeoutError):
                async with asyncio.timeout(1):
                    await client.aclose()
                    await pool.disconnect()

    async def call(self, command: Callable[[Any], Awaitable[T]]) -> T:
        """`await command(client)`, or raise `RedisAway` within 50 ms."""
        if time.monotonic() < self._closed_at:
            FAILURES.inc()
            raise RedisAway("not asked")
        try:
            async with asyncio.timeout(_CALL_SECONDS):
                answer = await command(self.client)
        except (RedisError, OSError, TimeoutError) as error:
            FAILURES.inc()
            log.warning("redis_away", error=repr(error), seconds=self._open_seconds)
            self._closed_at = time.monotonic() + self._open_seconds
            self._open_seconds = min(self._open_seconds * 2, _LONGEST_OPEN_SECONDS)
            raise RedisAway(repr(error)) from error
        self._open_seconds = _SHORTEST_OPEN_SECONDS
        return answer
