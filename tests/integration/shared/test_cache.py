"""The cache on a real Redis."""

import asyncio
import secrets

import msgspec
import pytest

from shared import consistency
from shared.cache import Cache, entry_name
from shared.consistency import Position
from shared.errors import Unavailable
from shared.redis import Redis
from shared.testing import eventually


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
        await asyncio.sleep(0)
        return self.row


@pytest.fixture
def name() -> str:
    return f"rows-{secrets.token_hex(4)}"


@pytest.fixture
def cache(name: str, redis: Redis) -> Cache[Row]:
    return Cache(name, Row, lambda row: row.version, redis)


async def age(redis: Redis, name: str, key: str = "k") -> None:
    """Let the entry be past its time."""
    kind, version, _, rest = (await redis.call("GET", entry_name(name, key))).split(b" ", 3)
    await redis.call("SET", entry_name(name, key), b" ".join((kind, version, b"1", rest)), "KEEPTTL")


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
    assert await before == Row("new", 2)
    assert await cache.get("k", slow_and_old) == Row("new", 2)


async def test_without_redis_reads_are_loads(dead_redis: Redis) -> None:
    cache = Cache("rows", Row, lambda row: row.version, dead_redis)
    table = Table(Row("a", 1))
    for _ in range(50):
        assert await cache.get("k", table.load) == Row("a", 1)
    await cache.invalidate("k", 2)
    assert table.reads == 50


async def test_without_redis_too_a_thousand_readers_cause_one_load(dead_redis: Redis) -> None:
    cache = Cache("rows", Row, lambda row: row.version, dead_redis)
    table = Table(Row("a", 1))
    await asyncio.gather(*(cache.get("k", table.load) for _ in range(1000)))
    assert table.reads == 1


async def test_the_writer_sees_its_write_though_the_tombstone_was_lost(
    name: str, cache: Cache[Row], dead_redis: Redis
) -> None:
    cut_off = Cache(name, Row, lambda row: row.version, dead_redis)
    table = Table(Row("a", 1))
    await cache.get("k", table.load)
    table.row = Row("b", 2)
    with consistency.tracked(None) as positions:
        await cut_off.invalidate("k", 2)
        token = positions.token()
    assert await cache.get("k", table.load) == Row("a", 1)
    with consistency.tracked(token):
        assert await cache.get("k", table.load) == Row("b", 2)
    assert await cache.get("k", table.load) == Row("b", 2), "the writer's read has healed it for all"


async def test_a_load_after_a_write_is_told_how_far_that_went(cache: Cache[Row]) -> None:
    with consistency.tracked(None) as positions:
        positions.advance("cluster", Position(1, 77))
        await cache.invalidate("k", 2)
    needed = []

    async def load() -> Row:
        needed.append(consistency.current().get("cluster"))
        return Row("b", 2)

    with consistency.tracked("other-1-5"):
        assert await cache.get("k", load) == Row("b", 2)
        assert consistency.current().token() == "other-1-5"
    assert needed == [Position(1, 77)]


async def test_a_deleted_row_is_remembered_as_gone(cache: Cache[Row]) -> None:
    table = Table(Row("a", 1))
    await cache.get("k", table.load)
    table.row = None
    with consistency.tracked("cluster-1-5"):
        await cache.invalidate("k", 2)
    assert [await cache.get("k", table.load) for _ in range(3)] == [None] * 3
    assert table.reads == 2
    assert await cache.get("k", Table(Row("a", 1)).load) is None


async def test_when_the_load_fails_what_is_past_its_time_is_shown(redis: Redis, name: str, cache: Cache[Row]) -> None:
    async def away() -> Row:
        raise Unavailable

    await cache.get("k", Table(Row("a", 1)).load)
    assert await redis.call("PTTL", entry_name(name, "k")) <= 366_000, "for a bounded time"
    await age(redis, name)
    assert await cache.get("k", away) == Row("a", 1)
    with pytest.raises(Unavailable):
        await cache.get("another", away)
    await cache.invalidate("k", 2)
    with pytest.raises(Unavailable):
        await cache.get("k", away)


async def test_an_entry_past_its_time_is_loaded_anew(redis: Redis, name: str, cache: Cache[Row]) -> None:
    await cache.get("k", Table(Row("a", 1)).load)
    await age(redis, name)
    fresh = Table(Row("b", 2))
    assert await cache.get("k", fresh.load) == Row("b", 2)
    assert await cache.get("k", fresh.load) == Row("b", 2)
    assert fresh.reads == 1


async def test_what_is_costly_is_loaded_anew_before_its_time_by_one_reader(
    redis: Redis, name: str, cache: Cache[Row]
) -> None:
    table = Table(Row("a", 1))
    await cache.get("k", table.load)
    kind, version, fresh, rest = (await redis.call("GET", entry_name(name, "k"))).split(b" ", 3)
    _, value = rest.split(b"\n", 1)
    costly = b" ".join((kind, version, fresh, b"1e9")) + b"\n" + value
    await redis.call("SET", entry_name(name, "k"), costly, "PX", 60_000)
    assert set(await asyncio.gather(*(cache.get("k", table.load) for _ in range(100)))) == {Row("a", 1)}

    async def loaded_anew() -> bool:
        return b"1e9" not in await redis.call("GET", entry_name(name, "k"))

    await eventually(loaded_anew)
    assert table.reads == 2
    assert cache.hit_ratio == pytest.approx(100 / 101)


async def test_flushed_under_a_thousand_readers_each_process_loads_a_key_once(name: str, redis: Redis) -> None:
    processes = [Cache(name, Row, lambda row: row.version, redis) for _ in range(3)]
    tables = [Table(Row("a", 1)) for _ in processes]
    rounds = 5

    async def read(process: int) -> None:
        assert await processes[process].get("k", tables[process].load) == Row("a", 1)

    for _ in range(rounds):
        before = asyncio.gather(*(read(n % 3) for n in range(500)))
        await asyncio.sleep(0)
        flush = asyncio.ensure_future(redis.call("FLUSHALL"))
        await asyncio.gather(*(read(n % 3) for n in range(500)), before, flush)
    reads = [table.reads for table in tables]
    print(f"1,000 readers of one key, FLUSHALL {rounds} times: database reads by process {reads}")
    # Five flushes, and the first of them met an empty cache before it.
    assert all(rounds <= n <= rounds + 1 for n in reads)


async def test_slow_fills_from_before_a_write_leave_nothing_stale(name: str, redis: Redis) -> None:
    """Fifty processes have read the old row when it is written, and fill the cache after."""
    barrier, arrived = asyncio.Event(), asyncio.Semaphore(0)

    async def read_then_wait() -> Row:
        arrived.release()
        await barrier.wait()
        return Row("old", 1)

    processes = [Cache(name, Row, lambda row: row.version, redis) for _ in range(50)]
    early = [asyncio.create_task(cache.get("k", read_then_wait)) for cache in processes]
    for _ in early:
        await arrived.acquire()
    await processes[0].invalidate("k", 2)
    barrier.set()
    await asyncio.gather(*early)
    after = [await cache.get("k", Table(Row("new", 2)).load) for cache in processes]
    stale = after.count(Row("old", 1))
    print(f"stale reads after the write: {stale} of {len(after)}")
    assert stale == 0


async def test_what_the_cache_was_good_for_is_said_at_the_end(redis: Redis, name: str) -> None:
    async with Cache.opened(name, Row, lambda row: row.version, redis) as cache:
        for _ in range(4):
            await cache.get("k", Table(Row("a", 1)).load)
        assert cache.hit_ratio == 0.75


class Wider(Row, frozen=True, kw_only=True):
    """The same in the next release."""

    plan: str


async def load_wider() -> Wider:
    return Wider("a", 1, plan="free")


async def load_nothing() -> Wider:
    raise Unavailable


async def test_what_another_release_keeps_is_loaded_anew(cache: Cache[Row], name: str, redis: Redis) -> None:
    table = Table(Row("a", 1))
    await cache.get("k", table.load)
    wider = Cache(name, Wider, lambda row: row.version, redis)
    with pytest.raises(Unavailable):
        await wider.get("k", load_nothing)
    assert await wider.get("k", load_wider) == Wider("a", 1, plan="free")
    assert await wider.get("k", load_nothing) == Wider("a", 1, plan="free")
    assert await cache.get("k", table.load) == Row("a", 1)
    assert table.reads == 1


async def test_what_another_release_keeps_is_not_shown_when_the_load_fails(
    cache: Cache[Row], name: str, redis: Redis
) -> None:
    await cache.get("k", Table(Row("a", 1)).load)
    await age(redis, name)
    with pytest.raises(Unavailable):
        await Cache(name, Wider, lambda row: row.version, redis).get("k", load_nothing)


@pytest.mark.parametrize("value", [b"", b"nonsense", b"V x y z\n{}", b"T\n", b"V 1\n{}"])
async def test_what_is_no_entry_is_replaced(cache: Cache[Row], name: str, redis: Redis, value: bytes) -> None:
    table = Table(Row("a", 1))
    await redis.call("SET", entry_name(name, "k"), value)
    assert await cache.get("k", table.load) == Row("a", 1)
    assert await cache.get("k", table.load) == Row("a", 1)
    assert table.reads == 1
    await redis.call("SET", entry_name(name, "k"), value)
    await cache.invalidate("k", 2)
    assert (await redis.call("GET", entry_name(name, "k"))).startswith(b"T 2\n")
