"""Wakes between processes, through Redis pub/sub: one channel, one subscription a process.

They are hints: without Redis, or when one is lost, streams are a little late (`poll`) and miss nothing.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any
from uuid import UUID

import msgspec
import redis.asyncio
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from services.notifier import repository
from services.notifier.settings import Settings
from services.notifier.streams import Hub
from shared.database import Database
from shared.errors import TenfoldError
from shared.logs import get_logger
from shared.redis import Redis, RedisAway

log = get_logger()

_CHANNEL = "tenfold:notifier:wakes"
_SILENCE_SECONDS = 5.0
_CONNECT_SECONDS = 2.0
_RETRY_SECONDS = 1.0
_USERS_A_QUERY = 1000


class Wakes:
    """Tells all streams of a user, wherever they are open, that there is something new."""

    def __init__(self, hub: Hub, others: Redis | None) -> None:
        self._hub = hub
        self._others = others
        self._pending: dict[UUID, int] = {}
        self._woken = asyncio.Event()

    @classmethod
    @asynccontextmanager
    async def opened(cls, hub: Hub, others: Redis | None) -> "AsyncIterator[Wakes]":
        wakes = cls(hub, others)
        task = asyncio.create_task(wakes._publish(), name="notifier-wakes")
        try:
            yield wakes
        finally:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task

    def announce(self, user_id: UUID, position: int) -> None:
        """To be called after the commit; does not wait."""
        self._hub.wake({user_id: position})
        if self._others is not None:
            self._pending[user_id] = max(position, self._pending.get(user_id, 0))
            self._woken.set()

    async def _publish(self) -> None:
        while True:
            await self._woken.wait()
            self._woken.clear()
            message, self._pending = msgspec.json.encode(self._pending), {}
            if self._others is not None:
                with suppress(RedisAway):
                    await self._others.call("PUBLISH", _CHANNEL, message)


async def listen(url: str, hub: Hub) -> None:
    """Hand the wakes of other processes to the hub, for ever, over a connection of its own."""
    while True:
        client = redis.asyncio.Redis.from_url(
            url,
            protocol=3,
            socket_connect_timeout=_CONNECT_SECONDS,
            socket_timeout=2 * _SILENCE_SECONDS,
            retry=Retry(NoBackoff(), 0),
            driver_info=None,
        )
        try:
            async with client, client.pubsub() as pubsub:
                await pubsub.subscribe(_CHANNEL)
                await _receive(pubsub, hub)
        except (RedisError, OSError, TimeoutError) as error:
            log.warning("wakes_not_heard", error=repr(error))
        finally:
            hub.hears_others = False
        await asyncio.sleep(_RETRY_SECONDS)


async def _receive(pubsub: Any, hub: Hub) -> None:
    silent = False
    while True:
        message = await pubsub.get_message(timeout=_SILENCE_SECONDS)
        if message is None:
            # A server that is gone without a word looks just like one that has nothing to say.
            if silent:
                raise TimeoutError("no answer to a ping")
            silent = True
            await pubsub.ping()
            continue
        silent = False
        if message["type"] == "subscribe":
            hub.hears_others = True
        elif message["type"] == "message":
            with suppress(msgspec.DecodeError):
                hub.wake(msgspec.json.decode(message["data"], type=dict[UUID, int]))


async def poll(db: Database, hub: Hub, settings: Settings) -> None:
    """Look for what is new for users with open streams, for ever: often where nobody else tells."""
    while True:
        seconds = settings.stream_poll_seconds if hub.hears_others else settings.stream_poll_alone_seconds
        await asyncio.sleep(seconds)
        users = hub.users()
        for start in range(0, len(users), _USERS_A_QUERY):
            try:
                async with db.transaction() as tx:  # the primary: a replica may be behind
                    hub.wake(await repository.list_stream_positions(tx, users[start : start + _USERS_A_QUERY]))
            except TenfoldError as error:
                log.warning("streams_not_polled", error=str(error))
