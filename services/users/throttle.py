"""Attempts with wrong credentials, slowed down: some are free, then each has to wait twice as long as the one before.

Counted by account, known or not, and by address (of IPv6 by /64). Whoever is logged in to an account has a count of
their own there, so strangers who guess cannot keep an owner out. An attempt counts when it begins, so that a hundred at
once are no hundred free ones; a good one takes its count back. One Lua step in Redis, on its clock; without Redis the
counts are kept in this process. Keys are hashes: no addresses lie in Redis.
"""

import hashlib
import ipaddress
import time
from collections import OrderedDict
from contextlib import suppress
from dataclasses import dataclass

from services.users.errors import TooManyAttempts
from services.users.models import Client
from services.users.settings import Settings
from shared.redis import Redis, RedisAway

_KEPT_SECONDS = 3600
_LOCAL_KEYS = 50_000

# KEYS: count. ARGV: free attempts, longest delay, seconds to keep. Answers the seconds to wait: 0 counts the attempt.
_BEGIN = """
local t = redis.call('TIME')
local now = t[1] + t[2] / 1000000
local state = redis.call('HMGET', KEYS[1], 'count', 'opens')
local opens = tonumber(state[2] or 0)
if now < opens then return tostring(opens - now) end
local count = tonumber(state[1] or 0) + 1
local delay = 0
if count > tonumber(ARGV[1]) then delay = math.min(2 ^ math.min(count - ARGV[1] - 1, 20), tonumber(ARGV[2])) end
redis.call('HSET', KEYS[1], 'count', count, 'opens', string.format('%.6f', now + delay))
redis.call('EXPIRE', KEYS[1], ARGV[3])
return '0'
"""
# KEYS: count. Takes one attempt back, and the wait that came with it.
_TAKE_BACK = """
local count = tonumber(redis.call('HGET', KEYS[1], 'count') or 0)
if count <= 1 then return redis.call('DEL', KEYS[1]) end
return redis.call('HSET', KEYS[1], 'count', count - 1, 'opens', 0)
"""


@dataclass(frozen=True)
class Attempt:
    account_key: str
    address_key: str


class Throttle:
    def __init__(self, redis: Redis | None, settings: Settings) -> None:
        self._redis = redis
        self._free = settings.login_free_attempts
        self._free_by_address = settings.login_free_attempts_by_address
        self._longest = settings.login_longest_delay_seconds
        self._local: OrderedDict[str, tuple[int, float]] = OrderedDict()

    async def begin(self, email: str, client: Client, *, familiar: bool) -> Attempt:
        """Count an attempt. Raises `TooManyAttempts` while the account or the address has to wait."""
        network = _network(client.address)
        attempt = Attempt(_key("account", email, network if familiar else ""), _key("address", network))
        for key, free in ((attempt.address_key, self._free_by_address), (attempt.account_key, self._free)):
            if (wait := await self._begin(key, free)) > 0:
                raise TooManyAttempts(wait)
        return attempt

    async def succeeded(self, attempt: Attempt) -> None:
        """The credentials were right: the account starts anew, the address gets this attempt back."""
        await self._forget(attempt.account_key)
        if self._redis is not None:
            try:
                await self._redis.call("EVAL", _TAKE_BACK, 1, attempt.address_key)
            except RedisAway:
                pass
            else:
                return
        count, _ = self._local.get(attempt.address_key, (0, 0.0))
        self._local[attempt.address_key] = (max(0, count - 1), 0.0)

    async def reset(self, email: str) -> None:
        """The owner has proven to be it, or there is no such account any more."""
        await self._forget(_key("account", email, ""))

    async def _begin(self, key: str, free: int) -> float:
        if self._redis is not None:
            try:
                arguments = (free, self._longest, _KEPT_SECONDS)
                return float(await self._redis.call("EVAL", _BEGIN, 1, key, *arguments))
            except RedisAway:
                pass
        now = time.monotonic()
        count, opens = self._local.get(key, (0, 0.0))
        if now < opens:
            return opens - now
        delay = min(2 ** min(count - free, 20), self._longest) if count >= free else 0
        self._local[key] = (count + 1, now + delay)
        self._local.move_to_end(key)
        if len(self._local) > _LOCAL_KEYS:
            self._local.popitem(last=False)
        return 0

    async def _forget(self, key: str) -> None:
        self._local.pop(key, None)
        if self._redis is not None:
            with suppress(RedisAway):  # it expires by itself
                await self._redis.call("DEL", key)


def _key(*parts: str) -> str:
    return f"throttle:{parts[0]}:{hashlib.sha256(':'.join(parts).encode()).hexdigest()[:32]}"


def _network(address: str) -> str:
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return address
    return str(ipaddress.ip_network((parsed, 64), strict=False)) if parsed.version == 6 else address
