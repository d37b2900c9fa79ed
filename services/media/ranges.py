"""HTTP ranges and conditions on bytes that never change (RFC 9110, sections 13 and 14)."""

import re
from typing import NamedTuple

from services.media.errors import RangeNotSatisfiable

_RANGE = re.compile(r"bytes=(\d{0,18})-(\d{0,18})")


class Span(NamedTuple):
    start: int
    length: int

    def content_range(self, size: int) -> str:
        return f"bytes {self.start}-{self.start + self.length - 1}/{size}"


def parse(header: str | None, size: int) -> Span | None:
    """The one range asked for; `None` for all, also where the header is not understood or asks for several.

    Raises `RangeNotSatisfiable` when there are no such bytes.
    """
    match = _RANGE.fullmatch(header.replace(" ", "")) if header else None
    if match is None or match[0] == "bytes=-":
        return None
    first, last = match[1], match[2]
    if not first:
        length = min(int(last), size)
        start = size - length
    else:
        start = int(first)
        if last and int(last) < start:
            return None  # not a range: ignored
        length = min(int(last) + 1 if last else size, size) - start
    if length <= 0:
        raise RangeNotSatisfiable(size)
    return Span(start, length)


def matches(header: str | None, etag: str) -> bool:
    """Whether `If-None-Match` names `etag`, compared weakly."""
    if header is None:
        return False
    return header.strip() == "*" or etag in (tag.strip().removeprefix("W/") for tag in header.split(","))
