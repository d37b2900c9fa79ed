"""Rate limits by GCRA (generic cell rate algorithm): one number a key, no windows that reset for everybody at once.

One Lua step in Redis, on its clock. Without Redis the limit is kept in this process.
Source: https://en.wikipedia.org/wiki/Generic_cell_rate_algorithm (virtual scheduling).
"""

import asyncio
import hashlib
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import msgspec

from shared.redis import NoScript, Redis, RedisAway

_LOCAL_KEYS = 50_000

# KEYS: theoretical arrival time. ARGV: seconds between requests, seconds of burst.
# Answers {allowed, microseconds until allowed, microseconds until the whole burst is free again}.
_GCRA = """
local t = redis.call('TIME')
local now = t[1] + t[2] / 1000000
local arrival = math.max(tonumber(redis.call('GET', KEYS[1]) or now), now)
if arrival > now + ARGV[2] then arrival = now end -- the clock was set back: no burst is so far ahead
local next_arrival = arrival + ARGV[1]
local wait = next_arrival - ARGV[2] - now
if wait > 0.000001 then return {0, math.ceil(wait * 1000000), math.ceil((arrival - now) * 1000000)} end
local ttl = math.max(1, math.ceil((next_arrival - now) * 1000))
redis.call('SET', KEYS[1], string.format('%.6f', next_arrival), 'PX', ttl)
return {1, 0, math.ceil((next_arrival - now) * 1000000)}
"""
_GCRA_HASH = hashlib.sha1(_GCRA.encode(), usedforsecurity=False).hexdigest()


@dataclass(frozen=True)
class Limit:
    """On average `requests` in `seconds`, all of them at once if need be."""

    requests: int
    seconds: float

    @cached_property
    def interval(self) -> float:
        return self.seconds / self.requests


class Decision(msgspec.Struct, frozen=True, gc=False):
    """`retry_after` and `reset` in seconds; `remaining` requests may follow at once."""

    allowed: bool
    remaining: int
    retry_after: float
    reset: float


class RateLimiter:
    def __init__(self, redis: Redis | None, instances: int = 1) -> None:
        """`instances` share a limit: while Redis is away each of them keeps its part of it by itself."""
        self._instances = instances
        self._redis = redis
        self._local: OrderedDict[str, float] = OrderedDict()

    async def hit(self, key: str, limit: Limit) -> Decision:
        """Count one request of `key` if it is allowed."""
        decided: asyncio.Future[Decision] = asyncio.get_running_loop().create_future()
        self.ask(key, limit, lambda decision: None if decided.done() else decided.set_result(decision))
        return await decided

    def ask(self, key: str, limit: Limit, tell: Callable[[Decision], None]) -> None:
        """The same without a task: `tell` is called, now or when Redis has answered. It must not raise."""
        if self._redis is None:
            tell(self.hit_alone(key, limit))
        else:
            _Question(self, self._redis, key, limit, tell).ask()

    def hit_alone(self, key: str, limit: Limit) -> Decision:
        """What is decided without Redis."""
        return self._hit_local(key, limit if self._instances == 1 else self._share(limit))

    def _share(self, limit: Limit) -> Limit:
        return Limit(max(1, limit.requests // self._instances), limit.seconds)

    def _hit_local(self, key: str, limit: Limit) -> Decision:
        now = time.monotonic()
        arrival = max(self._local.get(key, now), now)
        wait = arrival + limit.interval - limit.seconds - now
        if wait > 1e-6:
            return _decision(False, wait, arrival - now, limit)
        self._local[key] = arrival + limit.interval
        self._local.move_to_end(key)
        if len(self._local) > _LOCAL_KEYS:
            self._local.popitem(last=False)
        return _decision(True, 0, arrival + limit.interval - now, limit)


class _Question:
    """One request's, and where the answer of Redis goes."""

    __slots__ = ("_key", "_limit", "_limiter", "_redis", "_tell")

    def __init__(
        self, limiter: RateLimiter, redis: Redis, key: str, limit: Limit, tell: Callable[[Decision], None]
    ) -> None:
        self._limiter = limiter
        self._redis = redis
        self._key = key
        self._limit = limit
        self._tell = tell

    def ask(self, how: str = "EVALSHA", script: str = _GCRA_HASH) -> None:
        self._redis.ask(self, how, script, 1, f"limit:{self._key}", self._limit.interval, self._limit.seconds)

    def done(self) -> bool:
        return False

    def set_result(self, answer: tuple[int, int, int]) -> None:
        allowed, wait, used = answer
        self._tell(_decision(bool(allowed), wait / 1e6, used / 1e6, self._limit))

    def set_exception(self, error: RedisAway) -> None:
        if isinstance(error, NoScript):
            self.ask("EVAL", _GCRA)
        else:
            self._tell(self._limiter.hit_alone(self._key, self._limit))


def _decision(allowed: bool, wait: float, used: float, limit: Limit) -> Decision:
    remaining = int((limit.seconds - used) / limit.interval + 1e-6)
    return Decision(allowed, max(0, remaining), wait, used)
