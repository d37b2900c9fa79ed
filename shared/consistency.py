"""Consistency tokens: how far a caller's own writes have gone, so that its reads are never older than them.

A token lists, for each PostgreSQL cluster the caller has written to, the position in the write-ahead log of its last
write: timeline and LSN. Services read and answer it in the header `Consistency-Token`; the gateway also keeps it in a
cookie. It is opaque to callers and not secret: a forged one can cost a read from the primary, never an error.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import islice
from typing import NamedTuple

HEADER = "Consistency-Token"
_MAX_ENTRIES = 6
_ENTRY = re.compile(r"([0-9a-z]{1,13})-([0-9a-f]{1,8})-([0-9a-f]{1,16})")


class Position(NamedTuple):
    """A place in a cluster's log. A promotion begins a new timeline; an LSN alone says nothing across one, since a
    server that stayed behind may have gone further on the old one. The later of two writes is the greater position."""

    timeline: int
    lsn: int

    def reaches(self, other: "Position") -> bool:
        """Whether a server that has replayed up to here has surely replayed `other`."""
        return self.timeline >= other.timeline and self.lsn >= other.lsn


ANY = Position(0, 0)


class Positions:
    """The positions one request or event knows of, by cluster; moved forward by its own writes."""

    __slots__ = ("_positions", "written")

    def __init__(self, token: str | None = None) -> None:
        self._positions: dict[str, Position] = {}
        self.written = False
        for entry in token.split(".")[:_MAX_ENTRIES] if token else ():
            if match := _ENTRY.fullmatch(entry):
                self._positions[match[1]] = Position(int(match[2], 16), int(match[3], 16))

    def get(self, cluster: str) -> Position:
        """What must be replayed before a read from `cluster`; `ANY` when any state will do."""
        return self._positions.get(cluster, ANY)

    def advance(self, cluster: str, position: Position) -> None:
        # Put last: a token that is full drops what moved longest ago.
        self._positions[cluster] = max(position, self._positions.pop(cluster, ANY))
        self.written = True

    def merge(self, other: "Positions") -> None:
        """Know also what `other` knows; written is what either has."""
        for cluster, position in other._positions.items():
            self._positions[cluster] = max(position, self.get(cluster))
        self.written |= other.written

    def token(self) -> str:
        latest = islice(reversed(self._positions.items()), _MAX_ENTRIES)
        return ".".join(f"{cluster}-{at.timeline:x}-{at.lsn:x}" for cluster, at in reversed(list(latest)))


_current: ContextVar[Positions | None] = ContextVar("positions", default=None)


def current() -> Positions:
    """The positions of the request or event in hand; a throw-away where there is none."""
    return _current.get() or Positions()


def is_tracked() -> bool:
    """Whether anybody will ask for the token; if not, nobody needs to find out where the log stands."""
    return _current.get() is not None


def assume(positions: Positions) -> None:
    """Heed `positions` from here on, in a task that runs in a context of its own."""
    _current.set(positions)


@contextmanager
def tracked(token: str | None) -> Iterator[Positions]:
    """Track the positions of one request or event, starting from the `token` it came with."""
    positions = Positions(token)
    reset = _current.set(positions)
    try:
        yield positions
    finally:
        _current.reset(reset)
