"""The instances of one service: whose turn it is, and who is left out for a while."""

import random
import time
from collections.abc import Callable, Collection, Sequence
from typing import Generic, Protocol, TypeVar

_FAILURES_IN_A_ROW = 3
_SHORTEST_SECONDS = 2.0
_LONGEST_SECONDS = 60.0
_LEAVING_SECONDS = 1.0


class Instance(Protocol):
    """`url` is its base URL without a slash at the end; `in_flight` the number of requests it has to answer us."""

    url: str
    in_flight: int


M = TypeVar("M", bound=Instance)


class Instances(Generic[M]):
    """Power of two choices: of two at random, the one with fewer requests in flight (Mitzenmacher, 2001).

    One that fails three times in a row is ejected, longer each time it fails again right away. Never more than half of
    them are: when most fail, the fault is elsewhere, and asking the rest alone would bring them down too.
    """

    def __init__(self, members: Sequence[M] = (), monotonic: Callable[[], float] = time.monotonic) -> None:
        self._members = list(members)
        self._monotonic = monotonic
        self._failures: dict[M, int] = {}
        self._out: dict[M, float] = {}  # until when

    def __len__(self) -> int:
        return len(self._members)

    def add(self, member: M) -> None:
        self._members.append(member)

    def remove(self, member: M) -> None:
        self._members.remove(member)
        self._failures.pop(member, None)
        self._out.pop(member, None)

    def choose(self, tried: Collection[M] = ()) -> M | None:
        """Who is to be asked: somebody else than those who were `tried`, and who is left out only if nobody else is
        there. `None` when all were tried."""
        if tried or self._out:
            return self._choose(tried)
        return self._freer(self._members)

    def failed(self, member: M) -> bool:
        """It gave no answer or a bad one; whether it is ejected for that."""
        if member not in self._members:
            return False  # it has been removed meanwhile
        now = self._monotonic()
        self._failures[member] = count = self._failures.get(member, 0) + 1
        if count < _FAILURES_IN_A_ROW or (self._ejected(now, member) + 1) * 2 > len(self._members):
            return False
        longer = 2 ** min(count - _FAILURES_IN_A_ROW, 10)
        self._out[member] = now + min(_SHORTEST_SECONDS * longer, _LONGEST_SECONDS)
        return True

    def answered(self, member: M) -> None:
        if self._failures and self._failures.pop(member, 0) >= _FAILURES_IN_A_ROW:
            self._out.pop(member, None)

    def leaves(self, member: M) -> None:
        """It is about to stop, so others are asked as long as there are any."""
        self._out[member] = max(self._out.get(member, 0.0), self._monotonic() + _LEAVING_SECONDS)

    def _choose(self, tried: Collection[M]) -> M | None:
        now = self._monotonic()
        for member in [member for member, until in self._out.items() if until <= now]:
            del self._out[member]
        left = [member for member in self._members if member not in tried]
        return self._freer([member for member in left if member not in self._out] or left)

    def _freer(self, members: Sequence[M]) -> M | None:
        number = len(members)
        if number < 2:
            return members[0] if members else None
        first = int(random.random() * number)  # noqa: S311 - a choice
        second = (first + 1 + int(random.random() * (number - 1))) % number  # noqa: S311
        one, other = members[first], members[second]
        return one if one.in_flight <= other.in_flight else other

    def _ejected(self, now: float, besides: M) -> int:
        return sum(
            until > now and member is not besides and self._failures.get(member, 0) >= _FAILURES_IN_A_ROW
            for member, until in self._out.items()
        )
