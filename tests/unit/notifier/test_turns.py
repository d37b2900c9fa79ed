"""Turns at mail providers: never more than allowed, none held up by another, some taken at a time."""

import asyncio

import pytest

from services.notifier.sender import Turns
from shared.limits import Decision, Limit, RateLimiter


class Counting(RateLimiter):
    """Allows the first `allowed` hits of a key, then nothing."""

    def __init__(self, allowed: int) -> None:
        super().__init__(None)
        self.allowed = allowed
        self.hits: list[str] = []

    async def hit(self, key: str, limit: Limit) -> Decision:
        self.hits.append(key)
        left = self.allowed - self.hits.count(key)
        return Decision(left >= 0, max(0, left), 0.01, 0)


@pytest.mark.parametrize(("per_second", "at_a_time"), [(1, 1), (50, 2), (1000, 50)])
async def test_some_are_taken_at_a_time(per_second: int, at_a_time: int) -> None:
    limiter = Counting(3)
    turns = Turns(limiter, per_second)
    assert await asyncio.gather(*(turns.take("a@b.example") for _ in range(2 * at_a_time))) == [True] * 2 * at_a_time
    assert limiter.hits == ["email:b.example"] * 2


async def test_a_full_provider_holds_up_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.notifier.sender._TURN_SECONDS", 0.2)
    turns = Turns(Counting(1), 1)
    assert await turns.take("a@full.example")
    waiting = asyncio.gather(*(turns.take("a@FULL.example") for _ in range(3)))
    assert await turns.take("a@other.example")
    assert not waiting.done()
    assert await waiting == [False] * 3
