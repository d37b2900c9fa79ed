"""Redis and the limits on a real server, and without one."""

import asyncio
import secrets
import time
from pathlib import Path

import pytest

from devstack.stack import Stack
from devstack.topology import Topology
from shared.limits import Limit, RateLimiter
from shared.redis import FAILURES, Redis, RedisAway
from shared.testing import eventually
from tests.backing import Backing


async def test_a_caller_s_mistake_is_its_own(redis: Redis) -> None:
    good = asyncio.create_task(redis.call("PING"))
    with pytest.raises(TypeError):
        await redis.call("SET", "key", None)  # type: ignore[arg-type]
    with pytest.raises(RedisAway, match="wrong number of arguments"):
        await redis.call("SET", "key-without-value")
    assert await good == b"PONG"


async def test_a_cancelled_call_leaves_the_others_their_answers(redis: Redis) -> None:
    name = secrets.token_hex(4)

    async def write(n: int) -> None:
        await redis.call("SET", f"{name}-{n}", n)

    async def read(n: int) -> int:
        return int(await redis.call("GET", f"{name}-{n}"))

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


async def test_a_limit_finer_than_the_clock_is_kept_in_redis_too(redis: Redis) -> None:
    limiter, key = RateLimiter(redis), secrets.token_hex(4)
    assert all([(await limiter.hit(key, Limit(1_000_000_000, 1))).allowed for _ in range(20)])
    assert not limiter._local


async def test_a_redis_that_forgot_the_script_is_sent_it_and_has_not_failed(redis: Redis) -> None:
    limiter, key = RateLimiter(redis), secrets.token_hex(4)
    before = FAILURES._value.get()
    for _ in range(3):
        await redis.call("SCRIPT", "FLUSH")
        assert (await limiter.hit(key, Limit(5, 600))).allowed
    assert (await limiter.hit(key, Limit(5, 600))).remaining == 1
    assert not limiter._local
    assert FAILURES._value.get() == before


async def test_without_redis_each_instance_keeps_the_limit_itself(dead_redis: Redis) -> None:
    limiter, limit = RateLimiter(dead_redis), Limit(5, 600)
    decisions = [await limiter.hit("k", limit) for _ in range(8)]
    assert [d.allowed for d in decisions] == [True] * 5 + [False] * 3


async def test_who_waits_when_redis_goes_silent_is_told_and_nobody_asks_after(dead_redis: Redis) -> None:
    first = await asyncio.gather(*(dead_redis.call("PING") for _ in range(50)), return_exceptions=True)
    assert all(isinstance(answer, RedisAway) and str(answer) != "not asked" for answer in first)
    for _ in range(1000):
        with pytest.raises(RedisAway, match="not asked"):
            await dead_redis.call("PING")
    assert dead_redis._link is None
    assert dead_redis._unsent == []


async def test_no_call_pays_for_finding_out_that_redis_is_still_silent(dead_redis: Redis) -> None:
    with pytest.raises(RedisAway):
        await dead_redis.call("PING")
    probed = dead_redis._away_seconds

    async def probed_twice() -> bool:
        with pytest.raises(RedisAway, match="not asked"):
            await dead_redis.call("PING")
        return dead_redis._away_seconds >= 4 * probed

    await eventually(probed_twice)


async def test_a_frozen_or_restarted_redis_is_taken_up_again(tmp_path: Path) -> None:
    topology = Topology.backing(replicas=0, broker="none")
    async with Stack(topology, root=tmp_path, durable=False, keep_data=False) as stack:
        assert stack.urls.redis
        server = stack.child("redis")
        async with Redis.opened(stack.urls.redis) as redis:

            async def answers() -> bool:
                try:
                    return bool(await redis.call("PING") == b"PONG")
                except RedisAway:
                    return False

            assert await redis.call("SET", "key", "value") == b"OK"
            server.pause()
            waiting = await asyncio.gather(*(redis.call("GET", "key") for _ in range(100)), return_exceptions=True)
            assert all(isinstance(answer, RedisAway) for answer in waiting)
            server.resume()
            await eventually(answers)
            assert await redis.call("GET", "key") == b"value"
            await server.restart()
            await eventually(answers)


async def test_a_clock_of_redis_that_was_set_back_refuses_nobody(redis: Redis) -> None:
    limiter, limit = RateLimiter(redis), Limit(2, 60)
    keys = [secrets.token_hex(4) for _ in range(2)]
    await asyncio.gather(*(limiter.hit(key, limit) for key in keys))
    entry = next(name for name in await redis.call("KEYS", "*") if keys[0].encode() in name)
    await redis.call("SET", entry, time.time() + 3600, "KEEPTTL")
    assert [(await limiter.hit(keys[0], limit)).allowed for _ in range(3)] == [True, True, False]


async def test_a_redis_that_is_demoted_is_left_for_a_new_connection(tmp_path: Path) -> None:
    topology = Topology.backing(replicas=0, broker="none")
    async with Stack(topology, root=tmp_path, durable=False, keep_data=False) as stack:
        assert stack.urls.redis
        async with Redis.opened(stack.urls.redis) as redis, Redis.opened(stack.urls.redis) as admin:
            await redis.call("SET", "key", "value")
            link = redis._link
            assert link is not None
            await admin.call("REPLICAOF", "127.0.0.1", "1")
            with pytest.raises(RedisAway, match="READONLY"):
                await redis.call("SET", "key", "other")

            async def left() -> bool:
                return redis._link is not link

            await eventually(left)
            await admin.call("REPLICAOF", "NO", "ONE")

            async def written() -> bool:
                try:
                    return bool(await redis.call("SET", "key", "other") == b"OK")
                except RedisAway:
                    return False

            await eventually(written)


async def test_an_answer_that_is_there_in_time_is_no_failure_of_a_loop_that_was_not(redis: Redis) -> None:
    assert await redis.call("PING") == b"PONG"
    call = asyncio.create_task(redis.call("PING"))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    time.sleep(0.2)  # noqa: ASYNC251 - the loop is blocked
    assert await call == b"PONG"


async def test_a_password_and_a_database_are_sent_first(redis: Redis, backing: Backing) -> None:
    await redis.call("ACL", "SETUSER", "someone", "on", ">secret", "~*", "+@all")
    try:
        url = backing.redis.replace("redis://", "redis://someone:secret@").rsplit("/", 1)[0] + "/3"
        async with Redis.opened(url) as other:
            assert b"user=someone" in await other.call("CLIENT", "INFO")
            assert b" db=3 " in await other.call("CLIENT", "INFO")
        async with Redis.opened(url.replace("secret", "wrong")) as other:
            with pytest.raises(RedisAway, match="WRONGPASS"):
                await other.call("PING")
    finally:
        await redis.call("ACL", "DELUSER", "someone")
