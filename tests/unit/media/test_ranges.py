"""HTTP ranges and conditions."""

import pytest

from services.media import ranges
from services.media.errors import RangeNotSatisfiable
from services.media.ranges import Span


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ("bytes=0-0", Span(0, 1)),
        ("bytes=2-4", Span(2, 3)),
        ("bytes=5-", Span(5, 5)),
        ("bytes=5-100", Span(5, 5)),
        ("bytes=-3", Span(7, 3)),
        ("bytes=-100", Span(0, 10)),
        ("bytes = 1 - 2", Span(1, 2)),
    ],
)
def test_one_range(header: str, expected: Span) -> None:
    assert ranges.parse(header, 10) == [expected]


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ("bytes=0-1,3-4", [Span(0, 2), Span(3, 2)]),
        ("bytes=-2, 0-0", [Span(8, 2), Span(0, 1)]),
        ("bytes=0-1,50-60", [Span(0, 2)]),
        ("bytes=,0-1,", [Span(0, 2)]),
        ("bytes=0-9,0-9", []),  # more than there is
        ("bytes=" + ",".join(["0-0"] * 17), []),
        ("bytes=0-1,x", []),
    ],
)
def test_several_ranges(header: str, expected: list[Span]) -> None:
    assert ranges.parse(header, 10) == expected


@pytest.mark.parametrize("header", [None, "", "bytes=-", "bytes=4-2", "lines=1-2", "bytes=a-b"])
def test_what_is_no_range_means_all(header: str | None) -> None:
    assert ranges.parse(header, 10) == []


@pytest.mark.parametrize(
    "header", ["bytes=10-", "bytes=10-12", "bytes=-0", "bytes=999999999999999999-", "bytes=10-,11-12"]
)
def test_bytes_that_are_not_there(header: str) -> None:
    with pytest.raises(RangeNotSatisfiable) as caught:
        ranges.parse(header, 10)
    assert caught.value.headers == {"Content-Range": "bytes */10"}


def test_content_range() -> None:
    assert Span(2, 3).content_range(10) == "bytes 2-4/10"


@pytest.mark.parametrize(
    ("header", "expected"),
    [(None, False), ("*", True), ('"a"', True), ('W/"a"', True), ('"b", "a"', True), ('"b"', False)],
)
def test_if_none_match(header: str | None, expected: bool) -> None:
    assert ranges.matches(header, '"a"') is expected
