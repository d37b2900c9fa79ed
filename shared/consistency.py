"""Consistency tokens: how far a caller's own writes have gone, so that its reads are never older than them.

A token lists, for each PostgreSQL cluster the caller has written to, the position in the write-ahead log (LSN) of its
last write. Services read and answer it in the header `Consistency-Token`; the gateway also keeps it in a cookie. It is
opaque to callers and not secret: a forged one can cost a read from the primary, never an error.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import islice

HEADER = "Consistency-Token"
_MAX_CLUSTERS = 8
_ENTRY = re.compile(r"([0-9a-z]{1,13})-([0-9a-f]{1,16})")


class Positions:
    """The positions one request or event knows of, by cluster; moved forward by its own writes."""

    __slots__ = ("_lsns", "written")

    def __init__(self, token: str | None = None) -> None:
        self._lsns: dict[str, int] = {}
        self.written = False
        for entry in (token or "").split(".")[:_MAX_CLUSTERS]:
            if match := _ENTRY.fullmatch(entry):
                self._lsns[match[1]] = int(match[2], 16)

    def get(self, cluster: str) -> int:
        """The LSN to be replayed before a read from `cluster`; 0 when any state will do."""
        return self._lsns.get(cluster, 0)

    def advance(self, cluster: str, lsn: int) -> None:
        self._lsns[cluster] = max(lsn, self._lsns.get(cluster, 0))
        self.written = True

    def merge(self, other: "Positions") -> None:
        """Know also what `other` knows; written is what either has."""
        for cluster, lsn in other._lsns.items():
            self._lsns[cluster] = max(lsn, self._lsns.get(cluster, 0))
        self.written |= other.written

    def token(self) -> str:
        return ".".join(f"{cluster}-{lsn:x}" for cluster, lsn in islice(self._lsns.items(), _MAX_CLUSTERS))


_current: ContextVar[Positions | None] = ContextVar("positions", default=None)


def current() -> Positions:
    """The positions of the request or event in hand; a throw-away where there is none."""
    return _current.get() or Positions()


def is_tracked() -> bool:
    """Whether anybody will ask for the token; if not, nobody needs to find out where the log stands."""
    return _current.get() is not None


@contextmanager
def tracked(token: str | None) -> Iterator[Positions]:
    """Track the positions of one request or event, starting from the `token` it came with."""
    positions = Positions(token)
    reset = _current.set(positions)
    try:
        yield positions
    finally:
        _current.reset(reset)
