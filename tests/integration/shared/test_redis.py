"""Cache, limits and the breaker on a real Redis."""

import asyncio
import secrets
import socket
import time
from collections.abc import AsyncIterator, Iterator

import msgspec
import pytest

from shared.cache import Cache
from shared.limits import Limit, RateLimiter
from shared.redis import Redis, RedisAway


class Row(msgspec.Struct, frozen=True):
    name: str
    version: int


class Table:
    """What the cache stands before: one row, and how often it was read."""

    def __init__(self, row: Row | None) -> None:
        self.row = row
        self.reads = 0

    async def load(self) -> Row | None:
        self.reads += 1
        return self.row


@pytest.fixture
def cache(redis: Redis) -> Cache[Row]:
    return Cache(f"rows-{secrets.token_hex(4)}", Row, lambda row: row.version, redis)


@pytest.fixture
def black_hole() -> Iterator[str]:
    """A port that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"redis://127.0.0.1:{server.getsockname()[1]}/0"


@pytest.fixture(params=["refused", "black hole"])
async def dead_redis(request: pytest.FixtureRequest, black_hole: str) -> AsyncIterator[Redis]:
    async with Redis.opened(black_hole if request.param == "black hole" else "redis://127.0.0.1:1/0") as opened:
        yield opened


async def test_a_second_read_is_a_hit(cache: Cache[Row]) -> None:
    table = Table(Row("a", 1))
    assert await cache.get("k", table.load) == Row("a", 1)
    assert await cache.get("k", table.load) == Row("a", 1)
    assert table.reads == 1


async def test_what_does_not_exist_is_remembered_too(cache: Cache[Row]) -> None:
    table = Table(None)
    assert await cache.get("k", table.load) is None
    assert await cache.get("k", table.load) is None
    assert table.reads == 1


async def test_a_write_is_seen_at_once(cache: Cache[Row]) -> None:
    table = Table(Row("a", 1))
    await cache.get("k", table.load)
    table.row = Row("b", 2)
    await cache.invalidate("k", 2)
    assert await cache.get("k", table.load) == Row("b", 2)


async def test_a_fill_from_before_the_write_is_refused(cache: Cache[Row]) -> None:
    old, new = Table(Row("a", 1)), Table(Row("b", 2))
    await cache.invalidate("k", 2)
    assert await cache.get("k", old.load) == Row("a", 1)  # read from a lagging replica: answered, but not kept
    assert await cache.get("k", new.load) == Row("b", 2)
    assert await cache.get("k", old.load) == Row("b", 2)


async def test_a_row_made_after_a_miss_is_seen(cache: Cache[Row]) -> None:
    assert await cache.get("k", Table(None).load) is None
    await cache.invalidate("k", 1)
    assert await cache.get("k", Table(Row("a", 1)).load) == Row("a", 1)


async def test_a_thousand_readers_cause_one_load(cache: Cache[Row]) -> None:
    table = Table(Row("a", 1))
    assert set(await asyncio.gather(*(cache.get("k", table.load) for _ in range(1000)))) == {Row("a", 1)}
    assert table.reads == 1


async def test_one_caller_gone_leaves_the_load_to_the_others(cache: Cache[Row]) -> None:
    started, release = asyncio.Event(), asyncio.Event()

    async def load() -> Row:
        started.set()
        await release.wait()
        return Row("a", 1)

    first = asyncio.create_task(cache.get("k", load))
    second = asyncio.create_task(cache.get("k", load))
    await started.wait()
    first.cancel()
    release.set()
    assert await second == Row("a", 1)


async def test_who_asks_after_a_write_does_not_join_a_look_up_from_before(cache: Cache[Row]) -> None:
    started, release = asyncio.Event(), asyncio.Event()

    async def slow_and_old() -> Row:
        started.set()
        await release.wait()
        return Row("old", 1)

    before = asyncio.create_task(cache.get("k", slow_and_old))
    await started.wait()
    await cache.invalidate("k", 2)
    assert await cache.get("k", Table(Row("new", 2)).load) == Row("new", 2)
    release.set()
    assert await before == Row("old", 1)
    assert await cache.get("k", slow_and_old) == Row("new", 2)


async def test_without_redis_reads_are_loads_and_the_breaker_opens(dead_redis: Redis) -> None:
    cache = Cache("rows", Row, lambda row: row.version, dead_redis)
    table = Table(Row("a", 1))
    for _ in range(50):
        assert await cache.get("k", table.load) == Row("a", 1)
    await cache.invalidate("k", 2)
    assert table.reads == 50
    before = time.monotonic()
    for _ in range(1000):
        with pytest.raises(RedisAway, match="not asked"):
            await dead_redis.call(lambda pipeline: pipeline.ping())
    print(f"1,000 calls with the breaker open: {(time.monotonic() - before) * 1000:.1f} ms")


async def test_a_caller_s_mistake_leaves_nobody_waiting(redis: Redis) -> None:
    good = asyncio.create_task(redis.call(lambda pipeline: pipeline.ping()))
    with pytest.raises(TypeError):
        await redis.call(lambda pipeline: pipeline.set("key-without-value"))
    with pytest.raises(TypeError):
        await good
    assert await redis.call(lambda pipeline: pipeline.ping())


async def test_a_cancelled_call_leaves_the_others_their_answers(redis: Redis) -> None:
    name = secrets.token_hex(4)

    async def write(n: int) -> None:
        await redis.call(lambda pipeline: pipeline.set(f"{name}-{n}", n))

    async def read(n: int) -> int:
        return int(await redis.call(lambda pipeline: pipeline.get(f"{name}-{n}")))

    calls = [asyncio.create_task(write(n)) for n in range(9)]
    await asyncio.sleep(0)
    calls[4].cancel()
    await asyncio.gather(*calls, return_exceptions=True)
    assert await asyncio.gather(*(read(n) for n in range(9))) == list(range(9))


async def test_the_limit_is_shared_by_all_instances(redis: Redis) -> None:
    key, limit = secrets.token_hex(4), Limit(50, 600)
    instances = [RateLimiter(redis) for _ in range(4)]
    decisions = await asyncio.gather(*(limiter.hit(key, limit) for limiter in instances for _ in range(25)))
    assert sum(decision.allowed for decision in decisions) == 50
    refused = [d for d in decisions if not d.allowed]
    assert all(0 < d.retry_after <= 12.1 for d in refused)


async def test_without_redis_each_instance_keeps_the_limit_itself(dead_redis: Redis) -> None:
    limiter, limit = RateLimiter(dead_redis), Limit(5, 600)
    decisions = [await limiter.hit("k", limit) for _ in range(8)]
    assert [d.allowed for d in decisions] == [True] * 5 + [False] * 3
