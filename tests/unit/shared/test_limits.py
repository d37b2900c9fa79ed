from shared.limits import Limit, RateLimiter


async def test_a_burst_is_allowed_and_then_no_more() -> None:
    limiter, limit = RateLimiter(None), Limit(5, 600)
    decisions = [await limiter.hit("a", limit) for _ in range(7)]
    assert [d.allowed for d in decisions] == [True] * 5 + [False] * 2
    assert [d.remaining for d in decisions[:5]] == [4, 3, 2, 1, 0]
    assert 100 < decisions[-1].retry_after <= 120


async def test_keys_do_not_share_a_limit() -> None:
    limiter, limit = RateLimiter(None), Limit(1, 600)
    assert (await limiter.hit("a", limit)).allowed
    assert (await limiter.hit("b", limit)).allowed
    assert not (await limiter.hit("a", limit)).allowed


async def test_without_redis_each_of_several_instances_keeps_its_part() -> None:
    limiter, limit = RateLimiter(None, instances=4), Limit(20, 600)
    assert [(await limiter.hit("k", limit)).allowed for _ in range(6)] == [True] * 5 + [False]
