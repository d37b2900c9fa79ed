"""Versioned cache-aside: a cache that never goes back in time (docs/adr/0013).

Every entry carries its row's `version`. A write leaves a tombstone with the new version and the writer's consistency
token: who finds it loads from where that write is visible, and a fill that is older (say, read from a lagging replica)
is refused in one Lua step and answered with what is newer. A caller's token also says which version of a key it wrote
last, and an older entry is not shown to it, even when the tombstone was lost.

One look-up a key and process, however many wait for it; hot entries are loaded anew a little before their time by one
of their readers (XFetch: Vattani, Chierichetti, Lowenstein, "Optimal Probabilistic Cache Stampede Prevention", VLDB
2015); times are jittered; what does not exist is remembered shortly; an entry past its time is kept for a while, for
when the load fails. Without Redis every read is a load.

A write notes in its own transaction what it will invalidate, and `keep_healing` does it once more from the notes
(docs/adr/0034), so that an invalidation that was lost is made up for in seconds:

    async with db.transaction() as tx:
        ...
        await cache.note(tx, key, version)
    await cache.invalidate(key, version)
"""

import asyncio
import hashlib
import math
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Generic, NamedTuple, TypeVar

import asyncpg
import msgspec

from shared import consistency, metrics
from shared.consistency import Position
from shared.database import Connection, Database, Transaction
from shared.errors import TenfoldError, Unavailable
from shared.logs import get_logger
from shared.redis import Redis, RedisAway

T = TypeVar("T")
Load = Callable[[], Awaitable[T | None]]

log = get_logger()

_ABSENT_SECONDS = 5.0
_KEPT_SECONDS = 300.0  # past its time; must outlast any replica's lag and any load
_LONGEST_JITTER = 1.1
_EAGERNESS = 1.0  # XFetch's beta
_HEAL_SECONDS = 1.0
_HEAL_BATCH = 500
_LOADS = 3  # at most, when the key is written again and again meanwhile

LOOKUPS = metrics.Counter("tenfold_cache_lookups_total", "Lookups by outcome", ("cache", "outcome"))
FILLS = metrics.Counter("tenfold_cache_fills_total", "Fills and tombstones by outcome", ("cache", "outcome"))
HIT_RATIO = metrics.Gauge("tenfold_cache_hit_ratio", "Lookups answered from the cache since the start", ("cache",))

# An entry is a line of words and what it holds: `V <version> <fresh until, ms> <cost of the load, s>` and the value as
# JSON, or `T <version>` and the writer's token.
# KEYS: entry. ARGV: version, new entry, milliseconds to live, and now in ms where what was there is known to be gone.
# Answers the entry it was refused for, else nothing.
_FILL = """
local old = redis.call('GET', KEYS[1]) or ''
local version, fresh = string.match(old, '^[VT] (%d+) ?(%d*)')
if version then
  local over = fresh ~= '' and tonumber(fresh) < tonumber(ARGV[4])
  if tonumber(version) > tonumber(ARGV[1]) and not over then return old end
end
redis.call('SET', KEYS[1], ARGV[2], 'PX', ARGV[3])
"""
# KEYS: entry. ARGV: version, tombstone, milliseconds to live. A value as new as the write stays.
_BURY = """
local old = redis.call('GET', KEYS[1]) or ''
local kind, version = string.match(old, '^([VT]) (%d+)')
if version then
  local newer = tonumber(version) - tonumber(ARGV[1])
  if newer > 0 or (newer == 0 and kind == 'V') then return end
end
redis.call('SET', KEYS[1], ARGV[2], 'PX', ARGV[3])
"""


class Versioned(NamedTuple, Generic[T]):
    """What a look-up found; version 0 for what does not exist."""

    version: int
    value: T | None


class _Entry(NamedTuple):
    """`fresh_until` in ms of the epoch; `body` is `None` in a tombstone, which has a `token`."""

    version: int
    fresh_until: int = 0
    cost: float = 0.0
    body: bytes | None = None
    token: str = ""


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
        self._flights: dict[str, asyncio.Task[Versioned[T]]] = {}
        self._refreshes: dict[str, asyncio.Task[None]] = {}
        self._outcomes: Counter[str] = Counter()
        metrics.child(HIT_RATIO, name).set_function(lambda: self.hit_ratio)

    @classmethod
    @asynccontextmanager
    async def opened(
        cls, name: str, type_: type[T], version: Callable[[T], int], redis: Redis | None, *, ttl_seconds: float = 60
    ) -> "AsyncIterator[Cache[T]]":
        """Says at the end what the cache was good for."""
        cache = cls(name, type_, version, redis, ttl_seconds=ttl_seconds)
        try:
            yield cache
        finally:
            for task in cache._refreshes.values():
                task.cancel()
            await asyncio.gather(*cache._refreshes.values(), return_exceptions=True)
            log.info("cache_used", cache=name, hit_ratio=round(cache.hit_ratio, 4), **cache._outcomes)

    @property
    def hit_ratio(self) -> float:
        return self._outcomes["hit"] / (sum(self._outcomes.values()) or 1)

    async def get(self, key: str, load: Load[T]) -> T | None:
        """The value of `key`, from the cache or else from `load`; `None` when it does not exist.

        Never older than what the caller's consistency token says it wrote. `load` may run for several callers at once
        and in a task of its own, and must heed `consistency.current()`, as `Database.read` does. When it raises
        `Unavailable` or `TimeoutError`, a value past its time is shown instead, where one is kept and not known to be
        out of date.
        """
        if self._redis is None:
            return await load()
        entry = entry_name(self._name, key)
        least = consistency.current().get(_mark(entry)).lsn if consistency.is_tracked() else 0
        try:
            # Each caller asks for itself: an answer that was under way before it came could be older than what it was
            # shown elsewhere meanwhile. Loads are shared, for Redis has the last word when they end.
            found = _parse(await self._redis.call("GET", entry))
        except RedisAway:
            return await self._load_together(self._redis, "away", key, entry, None, least, load)
        if found is None:
            return await self._load_together(self._redis, "miss", key, entry, None, least, load)
        if found.body is None or found.version < least:
            known = found._replace(body=None)
            return await self._load_together(self._redis, "outdated", key, entry, known, least, load)
        now = time.time() * 1000
        if now >= found.fresh_until:
            return await self._load_together(self._redis, "expired", key, entry, found, least, load)
        shown = self._decoded(found)
        if shown is None:
            return await self._load_together(self._redis, "unreadable", key, entry, None, least, load)
        # XFetch. 1 - random() is never 0, of which there is no logarithm.
        lead = found.cost * 1000 * _EAGERNESS * -math.log(1.0 - random.random())  # noqa: S311 - no secret
        if now + lead >= found.fresh_until and key not in self._refreshes:
            self._refreshes[key] = asyncio.create_task(self._refresh(self._redis, key, entry, found, load))
        self._count("hit")
        return shown.value

    async def note(self, tx: Transaction, key: str, version: int) -> None:
        """Note what `invalidate` is going to be told, in the transaction that makes `version`: if the process dies or
        Redis is away after the commit, `keep_healing` makes up for it."""
        if self._redis is not None:
            # A fill from before the write can come late, and lives as long as any.
            lives = self._ttl * _LONGEST_JITTER + 2 * _KEPT_SECONDS
            await tx.execute(
                "INSERT INTO cache_notes (entry, version, moot_at) VALUES ($1, $2, now() + make_interval(secs => $3))",
                entry_name(self._name, key),
                version,
                lives,
            )

    async def invalidate(self, key: str, version: int) -> None:
        """Call after the commit that made `version`: nobody is shown what is older from now on.

        Calling it again, in any order and as often as wanted, does no harm.
        """
        if self._redis is None:
            return
        # A flight that took off before the write must not take who asks after it.
        self._flights.pop(key, None)
        entry = entry_name(self._name, key)
        token = ""
        if consistency.is_tracked():
            positions = consistency.current()
            token = positions.token()
            positions.advance(_mark(entry), Position(0, version))
        try:
            await _bury(self._redis, entry, version, token)
        except RedisAway:
            metrics.child(FILLS, self._name, "tombstone_lost").inc()

    def _land(self, key: str, flight: "asyncio.Task[Versioned[T]]") -> None:
        if self._flights.get(key) is flight:
            del self._flights[key]
        if not flight.cancelled():
            flight.exception()  # whoever waited has it; with nobody left it is nobody's

    def _count(self, outcome: str) -> None:
        self._outcomes[outcome] += 1
        metrics.child(LOOKUPS, self._name, outcome).inc()

    async def _load_together(
        self, redis: Redis, why: str, key: str, entry: str, known: _Entry | None, least: int, load: Load[T]
    ) -> T | None:
        self._count(why)
        flight = self._flights.get(key)
        if flight is not None:
            # Shielded: one caller that goes away must not take the answer from the others.
            found = await asyncio.shield(flight)
            if found.version >= least:
                return found.value
            # It took off for somebody who needed less.
        flight = asyncio.create_task(self._fill(redis, entry, known, load))
        self._flights[key] = flight
        flight.add_done_callback(lambda done: self._land(key, done))
        return (await asyncio.shield(flight)).value

    async def _refresh(self, redis: Redis, key: str, entry: str, found: _Entry, load: Load[T]) -> None:
        try:
            await self._fill(redis, entry, found, load)
        except Exception as error:  # noqa: BLE001 - nobody waits for it, and the next reader tries again
            log.info("cache_refresh_failed", cache=self._name, error=repr(error))
        finally:
            del self._refreshes[key]

    async def _fill(self, redis: Redis, entry: str, known: _Entry | None, load: Load[T]) -> Versioned[T]:
        """Load, keep, and answer what is then the newest. `known` is what Redis had."""
        for _ in range(_LOADS):
            started = time.monotonic()
            try:
                loaded = self._versioned(await self._load_past(known, load))
            except (Unavailable, TimeoutError):
                if known is None or (shown := self._decoded(known)) is None:
                    raise
                metrics.child(FILLS, self._name, "stale_shown").inc()
                return shown
            newer = await self._keep(redis, entry, loaded, known, time.monotonic() - started)
            if newer is None:
                return loaded
            if (shown := self._decoded(newer)) is not None:
                return shown
            known = newer  # written while it was loaded
        return loaded

    async def _keep(
        self, redis: Redis, entry: str, loaded: Versioned[T], known: _Entry | None, cost: float
    ) -> _Entry | None:
        """What Redis has instead, if that is newer."""
        now = int(time.time() * 1000)
        version, ttl, gone_at = loaded.version, self._ttl, 0
        if loaded.value is None:
            ttl, gone_at = min(_ABSENT_SECONDS, self._ttl), now
            if known is not None and known.token:
                version = known.version  # it was loaded past that write, so the write has deleted it
        lives = ttl * random.uniform(0.9, _LONGEST_JITTER)  # noqa: S311 - jitter
        head = f"V {version} {now + int(lives * 1000)} {cost:.6f}\n".encode()
        kept = int((lives + (_KEPT_SECONDS if version else 0)) * 1000)
        data = head + self._encoder.encode(loaded.value)
        try:
            refusal = await redis.call("EVAL", _FILL, 1, entry, version, data, kept, gone_at)
        except RedisAway:
            metrics.child(FILLS, self._name, "away").inc()
            return None
        metrics.child(FILLS, self._name, "refused" if refusal else "filled").inc()
        return _parse(refusal)

    async def _load_past(self, known: _Entry | None, load: Load[T]) -> T | None:
        """Load where the caller's writes are visible, and the write that left the tombstone, if there is one."""
        if known is None or not known.token:
            return await load()
        own = consistency.current()
        with consistency.tracked(known.token) as positions:
            positions.merge(own)
            return await load()

    def _versioned(self, value: T | None) -> Versioned[T]:
        return Versioned(0 if value is None else self._version(value), value)

    def _decoded(self, entry: _Entry) -> Versioned[T] | None:
        """`None` for a tombstone, and for what code of another release keeps that ours cannot read."""
        if entry.body is None:
            return None
        try:
            return Versioned(entry.version, self._decoder.decode(entry.body))
        except (ValueError, RecursionError):  # msgspec's errors are `ValueError`s
            return None


async def keep_healing(db: Database, redis: Redis) -> None:
    """Invalidate once more what was noted, until Redis has it; for ever, in every API process of a service."""
    while True:
        await asyncio.sleep(_HEAL_SECONDS * random.uniform(0.5, 1))  # noqa: S311 - spreading load
        try:
            while await heal(db, redis) == _HEAL_BATCH:
                pass
        except (TenfoldError, asyncpg.PostgresError) as error:
            log.warning("cache_not_healed", error=str(error))


async def heal(db: Database, redis: Redis) -> int:
    """One round of `keep_healing`: the oldest notes; returns how many are done with."""
    if not await db.read(_has_notes):
        return 0
    with consistency.tracked(None) as positions:
        async with db.transaction() as tx:
            notes = await tx.fetch(
                "SELECT id, entry, version, moot_at < now() AS moot FROM cache_notes ORDER BY id LIMIT $1", _HEAL_BATCH
            )
        # Not older than the writes: loads past the tombstones go where those are visible.
        token = positions.token()
    buried = await asyncio.gather(
        *(_bury(redis, note["entry"], note["version"], token) for note in notes), return_exceptions=True
    )
    # Another instance may do the same at the same time, which does no harm.
    done = [note["id"] for note, failure in zip(notes, buried, strict=True) if note["moot"] or failure is None]
    async with db.transaction() as tx:
        await tx.execute("DELETE FROM cache_notes WHERE id = ANY ($1)", done)
    return len(done)


async def _has_notes(connection: Connection) -> bool:
    return bool(await connection.fetchval("SELECT EXISTS (SELECT FROM cache_notes)"))


async def _bury(redis: Redis, entry: str, version: int, token: str) -> None:
    """Leave a tombstone. Raises `RedisAway`."""
    tombstone = f"T {version}\n{token}"
    await redis.call("EVAL", _BURY, 1, entry, version, tombstone, int(_KEPT_SECONDS * 1000))


def _parse(raw: bytes | None) -> _Entry | None:
    """`None` for what is no entry, too."""
    if raw is None:
        return None
    head, _, rest = raw.partition(b"\n")
    kind, *words = head.split(b" ")
    try:
        if kind == b"T":
            (version,) = words
            return _Entry(int(version), token=rest.decode())
        version, fresh_until, cost = words
        return _Entry(int(version), int(fresh_until), float(cost), rest)
    except ValueError:
        return None


def entry_name(cache: str, key: str) -> str:
    """What Redis calls an entry. A hash, so that a tombstone does not tell of whom something was forgotten."""
    return f"cache:{cache}:{hashlib.blake2b(key.encode(), digest_size=12).hexdigest()}"


def _mark(entry: str) -> str:
    """What an entry is called in a consistency token, where its version stands in the place of a position."""
    return hashlib.blake2b(entry.encode(), digest_size=7).hexdigest()[:13]
