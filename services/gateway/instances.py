"""The instances of one service: whose turn it is, and who is left out for a while."""

import random
import time
from collections.abc import Sequence
from typing import Generic, Protocol, TypeVar

_FAILURES_IN_A_ROW = 3
_SHORTEST_SECONDS = 2.0
_LONGEST_SECONDS = 60.0


class Instance(Protocol):
    in_flight: int

    def close(self) -> None: ...


M = TypeVar("M", bound=Instance)


class Instances(Generic[M]):
    """Power of two choices: of two at random, the one with fewer requests in flight (Mitzenmacher, 2001).

    One that fails three times in a row is ejected, longer each time it fails again right away. Never more than half of
    them are: when most fail, the fault is elsewhere, and asking the rest alone would bring them down too.
    """

    def __init__(self, members: Sequence[M]) -> None:
        self._members = list(members)
        self._failures: dict[int, int] = {}
        self._ejected_until: dict[int, float] = {}

    def in_order(self) -> list[M]:
        """All instances, the first to be tried first; the ejected ones last."""
        if len(self._members) == 1:
            return self._members
        order = random.sample(self._members, len(self._members))
        if self._failures:
            now = time.monotonic()
            order.sort(key=lambda member: self._ejected_until.get(id(member), 0.0) > now)
            healthy = sum(self._ejected_until.get(id(member), 0.0) <= now for member in order)
            if healthy < 2:
                return order
        if order[1].in_flight < order[0].in_flight:
            order[0], order[1] = order[1], order[0]
        return order

    def failed(self, member: M) -> None:
        key, now = id(member), time.monotonic()
        self._failures[key] = count = self._failures.get(key, 0) + 1
        others = sum(until > now for other, until in self._ejected_until.items() if other != key)
        if count >= _FAILURES_IN_A_ROW and (others + 1) * 2 <= len(self._members):
            longer = min(2 ** (count - _FAILURES_IN_A_ROW), 1024)
            self._ejected_until[key] = now + min(_SHORTEST_SECONDS * longer, _LONGEST_SECONDS)

    def answered(self, member: M) -> None:
        if self._failures:
            self._failures.pop(id(member), None)
            self._ejected_until.pop(id(member), None)

    def close(self) -> None:
        for member in self._members:
            member.close()
