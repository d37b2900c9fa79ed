"""The limit in front of a simulated service: so many work at a time, and who comes later waits for its turn."""

import heapq
import itertools
import random
from dataclasses import dataclass, field

import pytest

from shared.resilience import AdaptiveLimit
from shared.testing import Ticks

WORKERS = 16
SECONDS = 0.05
CAPACITY = WORKERS / SECONDS
PATIENCE = 1.0  # seconds; later answers are good for nothing


@dataclass
class Service:
    """Arrivals at random, times at random (exponential), first come first served."""

    ticks: Ticks
    limit: AdaptiveLimit | None
    leave: bool = False  # who has waited for PATIENCE goes away, and is not worked for any more
    seconds: float = SECONDS
    spread: float = 1.0  # around `seconds`: from nearly nothing to twice as long
    chance: random.Random = field(default_factory=lambda: random.Random(7))
    free_at: list[float] = field(default_factory=lambda: [0.0] * WORKERS)
    under_way: list[tuple[float, int, float, str]] = field(default_factory=list)
    numbers: "itertools.count[int]" = field(default_factory=itertools.count)
    good: int = 0
    refused: int = 0

    def run(self, rate: float, seconds: float, kind: str = "get") -> float:
        """Good answers a second when `rate` requests a second come."""
        begin, before = self.ticks(), self.good
        arrival = begin
        while (arrival := arrival + self.chance.expovariate(rate)) < begin + seconds:
            self._answer_until(arrival)
            self.ticks.move(arrival - self.ticks())
            if self.limit is not None and self.limit.take() is None:
                self.refused += 1
                continue
            start, given_up = max(arrival, self.free_at[0]), arrival + PATIENCE
            end = start + self.chance.uniform(self.seconds * (1 - self.spread), self.seconds * (1 + self.spread))
            if self.leave:
                end = min(end, given_up)
            if start < end:
                heapq.heapreplace(self.free_at, end)
            heapq.heappush(self.under_way, (end, next(self.numbers), arrival, kind))
        return (self.good - before) / seconds

    def _answer_until(self, now: float) -> None:
        while self.under_way and self.under_way[0][0] <= now:
            end, _, began, kind = heapq.heappop(self.under_way)
            self.ticks.move(max(0.0, end - self.ticks()))
            answered = end - began < PATIENCE
            self.good += answered
            if self.limit is None:
                continue
            if answered or not self.leave:
                self.limit.give(kind, began)
            else:
                self.limit.give_up(kind, began)


def limited(cap: int = 500) -> tuple[Service, AdaptiveLimit]:
    ticks = Ticks()
    limit = AdaptiveLimit(cap, ticks)
    return Service(ticks, limit), limit


def test_without_a_limit_overload_leaves_nothing_good() -> None:
    service = Service(Ticks(), None)
    service.run(CAPACITY * 0.5, 10)
    service.run(CAPACITY * 5, 10)
    assert service.run(CAPACITY * 5, 10) < 0.05 * CAPACITY


@pytest.mark.parametrize("leave", [False, True], ids=["all stay", "who has waited long leaves"])
@pytest.mark.parametrize("overload", [1.5, 5])
def test_overload_keeps_nine_tenths_of_the_peak(overload: float, leave: bool) -> None:
    service, limit = limited()
    service.leave = leave
    service.run(CAPACITY * 0.5, 10)
    service.run(CAPACITY * overload, 5)
    assert service.run(CAPACITY * overload, 15) >= 0.9 * CAPACITY
    assert limit.limit < 8 * WORKERS


def test_the_limit_is_found_within_seconds() -> None:
    service, limit = limited(cap=1000)
    service.run(CAPACITY * 0.5, 10)
    assert limit.limit == 1000
    service.run(CAPACITY * 5, 3)  # in which what came in too large a number is worked off
    assert service.run(CAPACITY * 5, 1) >= 0.9 * CAPACITY


def test_it_does_not_drift_upwards_under_overload() -> None:
    service, limit = limited()
    service.run(CAPACITY * 0.5, 10)
    service.run(CAPACITY * 2, 10)
    early = max(_limits(service, limit, CAPACITY * 2))
    service.run(CAPACITY * 2, 120)
    assert max(_limits(service, limit, CAPACITY * 2)) < 1.5 * early


def test_nobody_is_refused_below_capacity() -> None:
    service, _ = limited()
    service.run(CAPACITY * 0.7, 60)
    assert service.refused == 0


def test_after_overload_it_lets_everybody_in_again() -> None:
    service, _ = limited()
    service.run(CAPACITY * 0.5, 10)
    service.run(CAPACITY * 5, 30)
    service.run(CAPACITY * 0.7, 10)
    service.refused = 0
    service.run(CAPACITY * 0.7, 30)
    assert service.refused < 0.005 * CAPACITY * 0.7 * 30


def test_a_service_that_has_become_slower_is_the_usual_in_the_end() -> None:
    service, _ = limited()
    service.run(CAPACITY * 0.5, 10)
    service.seconds *= 5
    service.run(CAPACITY / 5 * 0.7, 60)
    service.refused = 0
    service.run(CAPACITY / 5 * 0.7, 60)
    assert service.refused < 0.02 * CAPACITY / 5 * 0.7 * 60


def test_more_of_the_slow_kind_is_no_overload() -> None:
    service, limit = limited()
    for _ in range(20):
        service.seconds = 0.01
        service.run(CAPACITY * 0.1, 3, "fast")
        service.seconds = 0.2
        service.run(CAPACITY * 0.1, 3, "slow")
    assert service.refused == 0
    assert limit.limit == 500


def test_many_callers_of_a_fast_service_are_served_one_after_the_other() -> None:
    """64 of them wait for 32 ms each where one waits for half a millisecond; that is no overload."""
    ticks = Ticks()
    limit = AdaptiveLimit(500, ticks)
    for callers in (1, 64):
        turns = [limit.take() for _ in range(callers)]
        for _ in range(20_000):
            ticks.move(0.0005)
            began = turns.pop(0)
            assert began is not None
            limit.give("get", began)
            turns.append(limit.take())
        for turn in turns:
            assert turn is not None
            limit.give("get", turn)
    assert limit.limit == 500


def test_there_is_a_hard_cap_for_the_first_too() -> None:
    limit = AdaptiveLimit(3, Ticks())
    assert [limit.take() is not None for _ in range(4)] == [True, True, True, False]
    assert limit.take(first=True) is None
    limit.leave()
    assert limit.take(first=True) is not None


def test_the_first_are_let_in_above_the_limit() -> None:
    limit = AdaptiveLimit(100, Ticks())
    limit.limit = 8
    assert sum(limit.take() is not None for _ in range(20)) == 8
    assert limit.take(first=True) is not None


def _limits(service: Service, limit: AdaptiveLimit, rate: float) -> list[float]:
    found = []
    for _ in range(50):
        service.run(rate, 0.2)
        found.append(limit.limit)
    return found
