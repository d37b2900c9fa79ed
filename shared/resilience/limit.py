"""How many requests may be under way at a time, found from how long they take.

When more are under way than can be worked on, they wait for one another: answers take longer and nothing more is done.
So requests beyond that point are refused at once, which costs little and keeps the others fast.
"""

import math
import time
from collections.abc import Callable

_FLOOR = 8.0
_TOLERANCE = 2.0
_SLACK_SECONDS = 0.1  # so short a wait is no overload: it is how a loop that is busy serves many at once
_WINDOW_SECONDS = 0.1
_WINDOW_SAMPLES = 10
_STRIKES = 2  # windows in a row; a single one may be chance
_KNOWN_WINDOWS = 10  # before that what is usual is a guess
_LEARNING_SECONDS = 30.0


class _Kind:
    """Requests that usually take the same time, and those of the current window."""

    __slots__ = ("count", "seconds", "usual", "windows")

    def __init__(self) -> None:
        self.usual = 0.0
        self.windows = 0
        self.seconds = 0.0
        self.count = 0

    def learn(self, weight: float) -> None:
        mean = self.seconds / self.count
        self.windows += 1
        self.usual += (mean - self.usual) * min(1.0, max(weight, 1 / self.windows))

    def clear(self) -> None:
        self.seconds, self.count = 0.0, 0


class AdaptiveLimit:
    """After the gradient algorithm (Netflix' concurrency-limits), with what it lacks for a mixture of requests:

    - Each kind of request has its own usual time, and a window compares all it took with all it usually takes, so that
      more uploads than before are no sign of overload.
    - The usual is learned only while there is no sign of overload, and slowly, so that it cannot drift upwards with
      it. Should the service have become slower for good, the limit sinks to its floor, where nobody waits for anybody,
      and what is measured there becomes the usual.
    - It is cut at once to what is answered in the time that one may take (Little's law), not by half at a time.
    - There is a hard cap, for drift that is slow enough is not seen.
    - A change takes effect before the next one: times of requests from before it are not looked at.

    A request costs a comparison, a count and two looks at the clock.
    """

    def __init__(self, cap: int, monotonic: Callable[[], float] = time.monotonic) -> None:
        """Never more than `cap`."""
        self.in_flight = 0
        self.limit = float(cap)
        self._cap = float(cap)
        self._floor = min(_FLOOR, self._cap)
        self._monotonic = monotonic
        self._kinds: dict[str, _Kind] = {}
        self._peak = 0
        self._samples = 0
        self._answers = 0  # of these, the ones that somebody still waited for
        self._strikes = 0
        self._window_from = self._changed_at = monotonic()

    @property
    def full(self) -> bool:
        return self.in_flight >= self.limit

    def take(self, *, first: bool = False) -> float | None:
        """When the request began, for `give`; `None` when it is refused. Who goes `first` is so at the cap only."""
        if self.in_flight >= (self._cap if first else self.limit):
            return None
        self.in_flight += 1
        if self.in_flight > self._peak:
            self._peak = self.in_flight
        return self._monotonic()

    def leave(self) -> None:
        """What was taken has ended in a way that tells nothing about the time it takes."""
        self.in_flight -= 1

    def give_up(self, kind: str, began: float) -> None:
        """What was taken at `began` has no answer: it failed, or nobody waited for it any longer.

        If it took longer than usual until then, that counts: under overload it is all that is to be seen of those who
        are hit hardest.
        """
        found = self._kinds.get(kind)
        if found is not None and found.windows >= _KNOWN_WINDOWS and self._monotonic() - began > found.usual:
            self.give(kind, began, answers=0)
        else:
            self.in_flight -= 1

    def give(self, kind: str, began: float, answers: int = 1) -> None:
        """What was taken at `began` has ended. There must be few kinds."""
        self.in_flight -= 1
        if began < self._changed_at:
            return
        now = self._monotonic()
        found = self._kinds.get(kind)
        if found is None:
            found = self._kinds[kind] = _Kind()
        found.seconds += now - began
        found.count += 1
        if not self._samples:
            self._window_from = now
        self._samples += 1
        self._answers += answers
        if self._samples >= _WINDOW_SAMPLES and now - self._window_from >= _WINDOW_SECONDS:
            self._adapt(now)

    def _adapt(self, now: float) -> None:
        seen = [kind for kind in self._kinds.values() if kind.count]
        actual = sum(kind.seconds for kind in seen)
        expected = sum(kind.usual * kind.count if kind.windows >= _KNOWN_WINDOWS else kind.seconds for kind in seen)
        allowed = _TOLERANCE * expected + _SLACK_SECONDS * self._samples
        elapsed = now - self._window_from
        busy = self._peak * 2 >= self.limit
        before = self.limit
        # Fewer than the floor are never in one another's way: whatever takes long then, the limit would not help.
        self._strikes = self._strikes + 1 if actual > allowed and self._peak > self._floor else 0
        if self._strikes >= _STRIKES:
            # By Little's law: as many as are answered in the time that one may take.
            needed = allowed / self._samples * self._answers / elapsed
            self.limit = min(self.limit, max(self._floor, needed + math.sqrt(needed)))
        elif busy and not self._strikes:
            self.limit = min(self._cap, self.limit + math.sqrt(self.limit))
        at_floor = self.limit <= self._floor
        for kind in seen:
            if at_floor or kind.windows < _KNOWN_WINDOWS or (actual <= allowed and not busy):
                kind.learn(1.0 if at_floor else elapsed / _LEARNING_SECONDS)
            kind.clear()
        if self.limit != before:
            self._changed_at = now
        self._samples, self._answers, self._peak = 0, 0, self.in_flight
