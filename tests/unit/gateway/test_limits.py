import math
from uuid import UUID

import pytest

from services.gateway.limits import Limits, parse_limit
from services.gateway.upstreams import RouteClass
from shared.auth import Principal, Role
from shared.errors import RateLimited
from shared.limits import Limit, RateLimiter
from shared.redis import Redis

LIMITS = {RouteClass.DEFAULT: Limit(3, 60), RouteClass.CREDENTIALS: Limit(2, 60), RouteClass.UPLOAD: Limit(1, 10)}


@pytest.fixture
def limits() -> Limits:
    return Limits(RateLimiter(None), LIMITS)


def principal(number: int) -> Principal:
    return Principal(UUID(int=number), UUID(int=0), Role.USER, 0)


def test_a_limit_reads_as_requests_per_seconds() -> None:
    assert parse_limit("20/60") == Limit(20, 60)


async def test_headers_tell_policy_and_what_is_left(limits: Limits) -> None:
    standing = await limits.hit(RouteClass.DEFAULT, None, "203.0.113.1")
    assert standing.headers() == {"RateLimit-Policy": '"default";q=3;w=60', "RateLimit": '"default";r=2;t=20'}
    assert standing.lines() == b'RateLimit-Policy: "default";q=3;w=60\r\nRateLimit: "default";r=2;t=20\r\n'


async def test_a_refusal_says_when_to_come_back(limits: Limits) -> None:
    await limits.hit(RouteClass.UPLOAD, principal(1), "203.0.113.1")
    with pytest.raises(RateLimited) as refused:
        await limits.hit(RouteClass.UPLOAD, principal(1), "203.0.113.1")
    assert refused.value.headers["Retry-After"] == "10"
    assert refused.value.headers["RateLimit"] == '"upload";r=0;t=10'
    await limits.hit(RouteClass.UPLOAD, principal(2), "203.0.113.1")
    await limits.hit(RouteClass.DEFAULT, principal(1), "203.0.113.1")


async def test_credentials_count_by_address_whoever_is_logged_in(limits: Limits) -> None:
    for number in (1, 2):
        await limits.hit(RouteClass.CREDENTIALS, principal(number), "203.0.113.1")
    with pytest.raises(RateLimited):
        await limits.hit(RouteClass.CREDENTIALS, principal(3), "203.0.113.1")


@pytest.mark.parametrize(
    ("one", "other", "shared"),
    [
        ("203.0.113.1", "203.0.113.2", False),
        ("2001:db8::1", "2001:db8:0:0:ffff::2", True),
        ("2001:db8::1", "2001:db8:0:1::1", False),
        ("::ffff:203.0.113.1", "203.0.113.1", True),
        ("nonsense", "", True),
    ],
)
async def test_which_addresses_are_one_caller(limits: Limits, one: str, other: str, shared: bool) -> None:
    first = await limits.hit(RouteClass.DEFAULT, None, one)
    second = await limits.hit(RouteClass.DEFAULT, None, other)
    assert (first != second) is shared
    assert math.isclose(LIMITS[RouteClass.DEFAULT].interval, 20)


async def test_each_of_four_gateways_keeps_a_quarter_while_redis_is_away() -> None:
    async with Redis.opened("redis://127.0.0.1:1/0") as away:
        limiters = [RateLimiter(away, 4) for _ in range(4)]
        passed = [(await limiter.hit("k", Limit(100, 3600))).allowed for limiter in limiters for _ in range(100)]
    assert sum(passed) == 100
