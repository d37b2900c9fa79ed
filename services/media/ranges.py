"""HTTP ranges and conditions on bytes that never change (RFC 9110, sections 13 and 14)."""

import re
from typing import NamedTuple

from services.media.errors import RangeNotSatisfiable

_UNIT = re.compile(r"bytes\s*=(.*)", re.DOTALL)
_RANGE = re.compile(r"\s*(\d{0,18})\s*-\s*(\d{0,18})\s*")
_MOST = 16  # who asks for more, or for bytes twice, gets all of them once


class Span(NamedTuple):
    start: int
    length: int

    def content_range(self, size: int) -> str:
        return f"bytes {self.start}-{self.start + self.length - 1}/{size}"


def parse(header: str | None, size: int) -> list[Span]:
    """The ranges asked for; none for all bytes, also where the header is not understood or asks for too much.

    Raises `RangeNotSatisfiable` when there are no such bytes.
    """
    unit = _UNIT.fullmatch(header) if header else None
    if unit is None:
        return []
    spans = []
    for item in filter(str.strip, unit[1].split(",")):
        match = _RANGE.fullmatch(item)
        if match is None or not (match[1] or match[2]) or (match[1] and match[2] and int(match[2]) < int(match[1])):
            return []  # not a range: all of it is ignored
        spans.append(_span(match[1], match[2], size))
    satisfiable = [span for span in spans if span.length > 0]
    if spans and not satisfiable:
        raise RangeNotSatisfiable(size)
    too_much = len(spans) > _MOST or sum(span.length for span in satisfiable) > size
    return [] if too_much else satisfiable


def _span(first: str, last: str, size: int) -> Span:
    if not first:
        length = min(int(last), size)
        return Span(size - length, length)
    start = int(first)
    return Span(start, min(int(last) + 1 if last else size, size) - start)


def matches(header: str | None, etag: str) -> bool:
    """Whether `If-None-Match` names `etag`, compared weakly."""
    if header is None:
        return False
    return header.strip() == "*" or etag in (tag.strip().removeprefix("W/") for tag in header.split(","))
