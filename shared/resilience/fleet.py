"""A service as its callers see it: its instances, and how it fares."""

import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Generic, TypeVar

from shared import metrics
from shared.errors import Unavailable
from shared.resilience.breaker import CircuitBreaker
from shared.resilience.discovery import Follower, Retirable
from shared.resilience.instances import Instances
from shared.resilience.limit import AdaptiveLimit
from shared.resilience.retries import RetryBudget

M = TypeVar("M", bound=Retirable)

# Answers of an instance that may be broken by itself. Not 503: all of them say so when there is too much to do.
_BROKEN = frozenset({500, 502, 504})

INSTANCES = metrics.Gauge("tenfold_upstream_instances", "Known instances of a service", ("upstream",))
EJECTED = metrics.Counter("tenfold_upstream_ejections_total", "Instances left out for failing", ("upstream",))
LIMIT = metrics.Gauge("tenfold_upstream_concurrency_limit_requests", "Requests that may be under way", ("upstream",))
IN_FLIGHT = metrics.Gauge("tenfold_upstream_in_flight_requests", "Requests that are under way", ("upstream",))
OPEN = metrics.Gauge("tenfold_upstream_breaker_open", "Whether the service is left alone", ("upstream",))
REFUSED = metrics.Counter(
    "tenfold_upstream_refused_total", "Requests refused before the service was asked", ("upstream", "reason")
)
RETRIES = metrics.Counter("tenfold_upstream_retries_total", "Requests that were tried again", ("upstream",))


class Fleet(Generic[M]):
    """All calls of one process to one service share it."""

    def __init__(self, name: str, cap: int, monotonic: Callable[[], float] = time.monotonic) -> None:
        self.name = name
        self.instances: Instances[M] = Instances(monotonic=monotonic)
        self.retries = RetryBudget(monotonic)
        self.breaker = CircuitBreaker(monotonic)
        self.limit = AdaptiveLimit(cap, monotonic)
        INSTANCES.labels(name).set_function(lambda: len(self.instances))
        LIMIT.labels(name).set_function(lambda: self.limit.limit)
        IN_FLIGHT.labels(name).set_function(lambda: self.limit.in_flight)
        OPEN.labels(name).set_function(lambda: self.breaker.is_open)

    @classmethod
    @asynccontextmanager
    async def opened(
        cls, name: str, urls: Sequence[str], make: Callable[[str], M], cap: int
    ) -> "AsyncIterator[Fleet[M]]":
        """The service at `urls` (see `discovery`); `make` makes an instance of a base URL. At most `cap` requests are
        under way at a time."""
        fleet = cls(name, cap)
        async with Follower(urls, fleet.instances, make).following():
            yield fleet

    def enter(self) -> None:
        """Before anything is sent. Raises `Unavailable` while the service is left alone."""
        self.retries.called()
        if not self.breaker.passes():
            metrics.child(REFUSED, self.name, "breaker").inc()
            raise Unavailable(f"{self.name} does not answer", retry_after=self.breaker.retry_after())

    def take(self) -> float:
        """A place among the requests under way, to be given back. Raises `Unavailable` when there is none."""
        began = self.limit.take()
        if began is None:
            metrics.child(REFUSED, self.name, "limit").inc()
            raise Unavailable(f"{self.name} is overloaded")
        return began

    def try_again(self) -> bool:
        if not self.retries.granted():
            return False
        metrics.child(RETRIES, self.name).inc()
        return True

    def answered(self, member: M, status: int, *, closes: bool = False) -> None:
        """`closes`: its connection, after this answer."""
        self.breaker.succeeded()
        if status in _BROKEN:
            self.failed(member)
            return
        self.instances.answered(member)
        if closes and status < 400:  # a refusal may do so for what it has not read
            self.instances.leaves(member)

    def failed(self, member: M) -> None:
        """`member` gave no answer. (Whether the service has failed a request as a whole is known when no more is tried:
        `breaker.failed`.)"""
        if self.instances.failed(member):
            metrics.child(EJECTED, self.name).inc()
