"""Versioned cache-aside: a cache that never goes back in time.

Every entry carries its row's `version`. A write leaves a tombstone with the new version, and a fill with an older one
(say, read from a lagging replica) is refused, in one Lua step. One look-up a key and process, however many wait for it;
TTLs are jittered; what does not exist is remembered shortly. Without Redis every read is a load.
"""

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

import msgspec

from shared import metrics
from shared.redis import Redis, RedisAway

T = TypeVar("T")

_ABSENT_SECONDS = 5.0
_TOMBSTONE_SECONDS = 60.0
_NOTHING = b"null"

LOOKUPS = metrics.Counter("tenfold_cache_lookups_total", "Lookups by outcome", ("cache", "outcome"))
FILLS = metrics.Counter("tenfold_cache_fills_total", "Fills by outcome", ("cache", "outcome"))

# KEYS: entry. ARGV: version, data, milliseconds to live. 0 when the cache has seen a newer version.
_FILL = """
local seen = redis.call('HGET', KEYS[1], 'version')
if seen and tonumber(seen) > tonumber(ARGV[1]) then return 0 end
redis.call('HSET', KEYS[1], 'version', ARGV[1], 'data', ARGV[2])
redis.call('PEXPIRE', KEYS[1], ARGV[3])
return 1
"""
# KEYS: entry. ARGV: version, milliseconds to live.
_TOMBSTONE = """
local seen = redis.call('HGET', KEYS[1], 'version')
if seen and tonumber(seen) > tonumber(ARGV[1]) then return 0 end
redis.call('HSET', KEYS[1], 'version', ARGV[1])
redis.call('HDEL', KEYS[1], 'data')
redis.call('PEXPIRE', KEYS[1], ARGV[2])
return 1
"""


class Cache(Generic[T]):
    """Values of one class of keys. `type_` must be what msgspec can encode."""

    def __init__(
        self, name: str, type_: type[T], version: Callable[[T], int], redis: Redis | None, *, ttl_seconds: float = 60
    ) -> None:
        self._name = name
        self._version = version
        self._redis = redis
        self._ttl = ttl_seconds
        self._decoder: msgspec.json.Decoder[T | None] = msgspec.json.Decoder(type_ | None)
        self._encoder = msgspec.json.Encoder()
        self._flights: dict[str, asyncio.Task[T | None]] = {}

    async def get(self, key: str, load: Callable[[], Awaitable[T | None]]) -> T | None:
        """The value of `key`, from the cache or else from `load`; `None` when it does not exist.

        `load` may run for several callers at once and in a task of its own.
        """
        if self._redis is None:
            return await load()
        flight = self._flights.get(key)
        if flight is None:
            flight = asyncio.create_task(self._look_up(self._redis, f"cache:{self._name}:{key}", load))
            self._flights[key] = flight
            flight.add_done_callback(lambda done: self._land(key, done))
        # Shielded: one caller that goes away must not take the answer from the others.
        return await asyncio.shield(flight)

    async def invalidate(self, key: str, version: int) -> None:
        """Call after the commit that made `version`: entries and fills older than it are gone from now on."""
        if self._redis is None:
            return
        # A flight that took off before the write must not take who asks after it.
        self._flights.pop(key, None)
        entry = f"cache:{self._name}:{key}"
        arguments = [version, int(_TOMBSTONE_SECONDS * 1000)]
        try:
            await self._redis.call(lambda pipeline: pipeline.eval(_TOMBSTONE, 1, entry, *arguments))
        except RedisAway:
            metrics.child(FILLS, self._name, "tombstone_lost").inc()

    def _land(self, key: str, flight: "asyncio.Task[T | None]") -> None:
        if self._flights.get(key) is flight:
            del self._flights[key]

    async def _look_up(self, redis: Redis, entry: str, load: Callable[[], Awaitable[T | None]]) -> T | None:
        try:
            data = await redis.call(lambda pipeline: pipeline.hget(entry, "data"))
        except RedisAway:
            metrics.child(LOOKUPS, self._name, "away").inc()
            return await load()
        if data is not None:
            metrics.child(LOOKUPS, self._name, "hit").inc()
            return self._decoder.decode(data)
        metrics.child(LOOKUPS, self._name, "miss").inc()
        value = await load()
        version, data, ttl = 0, _NOTHING, _ABSENT_SECONDS
        if value is not None:
            version, data, ttl = self._version(value), self._encoder.encode(value), self._ttl
        arguments = [version, data, int(ttl * random.uniform(0.9, 1.1) * 1000)]  # noqa: S311 - jitter
        try:
            filled = await redis.call(lambda pipeline: pipeline.eval(_FILL, 1, entry, *arguments))
            metrics.child(FILLS, self._name, "filled" if filled else "refused").inc()
        except RedisAway:
            metrics.child(FILLS, self._name, "away").inc()
        return value
