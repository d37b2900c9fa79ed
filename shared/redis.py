"""Redis behind short timeouts and a breaker: slow or gone, it costs a request some 50 ms once, and then nothing.

Redis holds nothing that cannot be had again, so every caller has a way to go on without it.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

import redis.asyncio
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from shared import metrics
from shared.logs import get_logger

log = get_logger()

Command = Callable[[Any], object]

_CALL_SECONDS = 0.05
_CONNECTIONS = 20
_SHORTEST_OPEN_SECONDS = 1.0
_LONGEST_OPEN_SECONDS = 10.0

FAILURES = metrics.Counter("tenfold_redis_failures_total", "Calls to Redis that failed or were not tried")


class RedisAway(Exception):
    """Redis did not answer in time, or has just not and is not asked."""


class Redis:
    """Commands that are asked for in one turn of the event loop go out in one write and come back in one read."""

    def __init__(self, client: Any) -> None:
        self.client = client
        self._waiting: list[tuple[Command, asyncio.Future[Any]]] = []
        self._batches: set[asyncio.Task[None]] = set()
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
            driver_info=None,
        )
        client = redis.asyncio.Redis(connection_pool=pool)
        opened = cls(client)
        try:
            yield opened
        finally:
            await asyncio.gather(*opened._batches, return_exceptions=True)
            with suppress(RedisError, OSError, TimeoutError):
                async with asyncio.timeout(1):
                    await client.aclose()
                    await pool.disconnect()

    async def call(self, command: Command) -> Any:
        """The answer to `command(pipeline)`, which adds exactly one command; or raise `RedisAway`, within 60 ms.

        A caller that is cancelled leaves the others' answers where they belong.
        """
        if time.monotonic() < self._closed_at:
            FAILURES.inc()
            raise RedisAway("not asked")
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[Any] = loop.create_future()
        self._waiting.append((command, answer))
        if len(self._waiting) == 1:
            loop.call_soon(self._send)
        return await answer

    def _send(self) -> None:
        batch, self._waiting = self._waiting, []
        task = asyncio.create_task(self._run(batch))
        self._batches.add(task)
        task.add_done_callback(self._batches.discard)

    async def _run(self, batch: list[tuple[Command, asyncio.Future[Any]]]) -> None:
        pipeline = self.client.pipeline(transaction=False)
        try:
            for command, _ in batch:
                command(pipeline)
            if len(pipeline) != len(batch):
                raise TypeError("each call adds exactly one command")
            answers: list[Any] = await pipeline.execute(raise_on_error=False)
            self._open_seconds = _SHORTEST_OPEN_SECONDS
        except (RedisError, OSError, TimeoutError) as error:
            FAILURES.inc(len(batch))
            self._open(repr(error))
            answers = [RedisAway(repr(error))] * len(batch)
        except Exception as error:  # noqa: BLE001 - a mistake of one caller must not leave the others waiting
            answers = [error] * len(batch)
        for (_, future), answer in zip(batch, answers, strict=True):
            if future.done():
                continue
            if isinstance(answer, RedisError):
                answer = RedisAway(repr(answer))
            if isinstance(answer, Exception):
                future.set_exception(answer)
            else:
                future.set_result(answer)

    def _open(self, reason: str) -> None:
        """Ask nothing for a while, longer each time. Calls that were under way together count as one failure."""
        now = time.monotonic()
        if now >= self._closed_at:
            log.warning("redis_away", error=reason, seconds=self._open_seconds)
            self._closed_at = now + self._open_seconds
            self._open_seconds = min(self._open_seconds * 2, _LONGEST_OPEN_SECONDS)
