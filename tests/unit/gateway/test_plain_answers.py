"""Answers that are read without a parser, against the parser: none is read that it would refuse, or otherwise than
it would read it; and whatever is read so leaves it at the beginning of the next answer."""

from collections.abc import Sequence
from typing import NamedTuple
from unittest import mock

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from services.gateway import headers
from services.gateway.headers import to_caller
from services.gateway.upstream_pool import _MAX_PLAIN, Answer, Pool, _Connection

HEAD = b"HTTP/1.1 200 OK\r\n"
OK = HEAD + b"Content-Length: 2\r\n\r\nok"


class Transport:
    closed = False

    def write(self, data: bytes) -> None: ...

    def pause_reading(self) -> None: ...

    def abort(self) -> None:
        self.closed = True

    def is_closing(self) -> bool:
        return self.closed


class Read(NamedTuple):
    """What has become of one answer."""

    status: int
    first: bytes
    lines: list[bytes]
    back: list[bytes]
    seen: int
    body: bytes | None
    failed: bool
    closes: bool
    kept: bool


class Service:
    """One connection to a service."""

    def __init__(self, *, plain: bool = True) -> None:
        self._plain = plain
        self.taken = 0  # without the parser
        self.pool = Pool("http://service", 10)
        self._connection = _Connection(self.pool, loop=None)  # type: ignore[arg-type]
        self._connection.connection_made(Transport())  # type: ignore[arg-type]

    def _take(self, answer: Answer, data: bytes) -> bool:
        taken = self._plain and _Connection._plain(self._connection, answer, data)
        self.taken += taken
        return taken

    def says(self, *pieces: bytes, method: str = "GET") -> Read:
        """An exchange in which these arrive."""
        self.pool._idle.clear()
        self.pool.in_flight += 1
        answer = self._connection.exchange(method, b"", None, chunked=False)
        with mock.patch.object(self._connection, "_plain", self._take):
            for piece in pieces:
                self._connection.data_received(piece)
        answer.close()
        return Read(
            answer.status, answer.first, answer.lines, answer.back, answer.seen, answer.ready(),
            answer._error is not None, answer.closes, bool(self.pool._idle),
        )  # fmt: skip


def same(*exchanges: Sequence[bytes]) -> int:
    """Both ways to read them come to the same; how many needed no parser."""
    service, parser = Service(), Service(plain=False)
    for pieces in exchanges:
        read = service.says(*pieces)
        assert read == parser.says(*pieces)
        if not read.kept:
            break
    return service.taken


@pytest.mark.parametrize(
    "answer",
    [
        OK,
        HEAD + b"Content-Length: 0\r\n\r\n",
        b"HTTP/1.1 404 Not Found at all\r\nContent-Length: 2\r\n\r\nno",
        b"HTTP/1.1 503 \r\nContent-Length: 2\r\n\r\nno",
        HEAD + b"Date: d\r\nETag: \"\xe4\"\r\nSet-Cookie: a=b; c\r\nset-cookie: d\r\nContent-Length: 2\r\n\r\nok",
        HEAD + b"Content-Length: 2\r\nConnection: Keep-Alive\r\nKeep-Alive: timeout=5\r\nX: a  b \r\n\r\nok",
        HEAD + b"Content-Length: 4\r\n\r\n\r\n\r\n",
    ],
)  # fmt: skip
def test_what_most_answers_are_needs_no_parser(answer: bytes) -> None:
    assert same([answer], [answer]) == 2


# Most of what can be wrong with an answer, or needs more than a look.
OTHERS = {
    "old": b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nok",
    "of no version": b"HTTP/1.2 200 OK\r\nContent-Length: 2\r\n\r\nok",
    "lower case": OK.replace(b"HTTP", b"http"),
    "no reason": b"HTTP/1.1 200\r\nContent-Length: 2\r\n\r\nok",
    "two spaces": b"HTTP/1.1  200 OK\r\nContent-Length: 2\r\n\r\nok",
    "a long status": b"HTTP/1.1 2000 OK\r\nContent-Length: 2\r\n\r\nok",
    "a strange status": b"HTTP/1.1 700 OK\r\nContent-Length: 2\r\n\r\nok",
    "control characters in the reason": b"HTTP/1.1 200 O\x00K\r\nContent-Length: 2\r\n\r\nok",
    "without body": b"HTTP/1.1 204 No Content\r\nContent-Length: 2\r\n\r\nok",
    "not modified": b"HTTP/1.1 304 Not Modified\r\nContent-Length: 2\r\n\r\n",
    "informational": b"HTTP/1.1 100 Continue\r\n\r\n" + OK,
    "informational with a length": b"HTTP/1.1 103 Early\r\nContent-Length: 2\r\n\r\nok" + OK,
    "a protocol of its own": b"HTTP/1.1 101 Switching\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n",
    "upgrade": HEAD + b"Upgrade: x\r\nContent-Length: 2\r\n\r\nok",
    "upgrade in earnest": HEAD + b"Upgrade: x\r\nConnection: upgrade\r\nContent-Length: 2\r\n\r\nok",
    "last": HEAD + b"Connection: close\r\nContent-Length: 2\r\n\r\nok",
    "last among others": HEAD + b"Connection: keep-alive, close\r\nContent-Length: 2\r\n\r\nok",
    "first and last": HEAD + b"Connection: keep-alive\r\nConnection: close\r\nContent-Length: 2\r\n\r\nok",
    "last by another name": HEAD + b"proxy-connection: close\r\nContent-Length: 2\r\n\r\nok",
    "naming": HEAD + b"Connection: X-A\r\nX-A: 1\r\nContent-Length: 2\r\n\r\nok",
    "chunked": HEAD + b"Transfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n",
    "chunked with a length": HEAD + b"Transfer-Encoding: chunked\r\nContent-Length: 2\r\n\r\nok",
    "length and chunked": HEAD + b"Content-Length: 2\r\ntransfer-encoding: chunked\r\n\r\nok",
    "coded": HEAD + b"Content-Length: 2\r\nTransfer-Encoding: gzip\r\n\r\nok",
    "without end": HEAD + b"\r\nok",
    "two lengths": HEAD + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\nok",
    "the same length twice": HEAD + b"Content-Length: 2\r\nContent-Length: 2\r\n\r\nok",
    "two spellings": HEAD + b"content-length: 3\r\nContent-Length: 2\r\n\r\nok",
    "another spelling": HEAD + b"content-length: 2\r\n\r\nok",
    "a list": HEAD + b"Content-Length: 2, 2\r\n\r\nok",
    "a sign": HEAD + b"Content-Length: +2\r\n\r\nok",
    "zeros": HEAD + b"Content-Length: 02\r\n\r\nok",
    "too much": OK + b"k",
    "two answers": OK + OK,
    "too little": OK[:-1],
    "no end of its head": HEAD + b"Content-Length: 0\r\n",
    "folded": HEAD + b"X: a\r\n b\r\nContent-Length: 2\r\n\r\nok",
    "folded into nothing": HEAD + b"X: a\r\n \r\nContent-Length: 2\r\n\r\nok",
    "a folded length": HEAD + b"Content-Length: 2\r\n 2\r\n\r\nok",
    "bare CR": HEAD + b"X: a\rContent-Length: 3\r\nContent-Length: 2\r\n\r\nok",
    "bare LF": HEAD + b"X: a\nContent-Length: 3\r\nContent-Length: 2\r\n\r\nok",
    "bare LF first": b"HTTP/1.1 200 OK\nX: a\r\nContent-Length: 2\r\n\r\nok",
    "bare LFs": OK.replace(b"\r\n", b"\n"),
    "NUL": HEAD + b"X: a\x00\r\nContent-Length: 2\r\n\r\nok",
    "tab": HEAD + b"X: a\tb\r\nContent-Length: 2\r\n\r\nok",
    "tab first": HEAD + b"X: \ta\r\nContent-Length: 2\r\n\r\nok",
    "DEL": HEAD + b"X: a\x7f\r\nContent-Length: 2\r\n\r\nok",
    "NUL in a name": HEAD + b"X\x00: a\r\nContent-Length: 2\r\n\r\nok",
    "no name": HEAD + b": a\r\nContent-Length: 2\r\n\r\nok",
    "no colon": HEAD + b"X\r\nContent-Length: 2\r\n\r\nok",
    "space before the colon": HEAD + b"X : a\r\nContent-Length: 2\r\n\r\nok",
    "space before the name": HEAD + b" X: a\r\nContent-Length: 2\r\n\r\nok",
    "no space": HEAD + b"X:a\r\nContent-Length: 2\r\n\r\nok",
    "more space": HEAD + b"X:  a\r\nY: b \r\nContent-Length: 2\r\n\r\nok",
    "no value": HEAD + b"X: \r\nY:\r\nContent-Length: 2\r\n\r\nok",
    "umlauts in a name": HEAD + b"\xe4: a\r\nContent-Length: 2\r\n\r\nok",
    "empty lines first": b"\r\n\r\n" + OK,
    "nothing": b"\r\n\r\n",
    "none": b"SSH-2.0\r\n\r\nContent-Length: 2\r\n\r\n",
    "long": HEAD + b"X: " + b"x" * _MAX_PLAIN + b"\r\nContent-Length: 2\r\n\r\nok",
}  # fmt: skip


@pytest.mark.parametrize("answer", OTHERS.values(), ids=OTHERS)
def test_all_others_are_read_as_the_parser_reads_them(answer: bytes) -> None:
    assert same([answer], [OK]) <= 1  # the second one
    for at in range(1, min(len(answer), 200)):
        same([OK], [answer[:at], answer[at:]], [OK])


@pytest.mark.parametrize(
    ("first", "line", "method", "back"),
    [
        (b"HTTP/1.1 200 Fine", b"Content-Length: 2", "GET", [b"Content-Length: 2"]),
        (b"HTTP/1.1 200 Fine", b"content-length: 2", "GET", [b"content-length: 2"]),
        (b"HTTP/1.1 200 Fine", b"Content-Length: 2", "HEAD", [b"Content-Length: 2"]),
        (b"HTTP/1.1 304 -", b"Content-Length: 2", "GET", [b"Content-Length: 2"]),
        (b"HTTP/1.1 204 -", b"Content-Length: 2", "GET", []),
        (b"HTTP/1.1 204 -", b"content-length:2", "GET", []),
        (b"HTTP/1.1 200 ", b"Content-Length: 2\r\nConnection: content-length", "GET", [b"Content-Length: 2"]),
    ],
)
def test_a_length_goes_back_as_it_came(first: bytes, line: bytes, method: str, back: list[bytes]) -> None:
    read = Service().says(first + b"\r\n" + line + b"\r\n\r\n", b"ok"[: 2 * (method == "GET")], method=method)
    assert (read.first, read.back) == (first, back)


def test_the_reason_of_an_interim_answer_is_not_the_answers() -> None:
    assert (
        Service().says(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200\r\nContent-Length: 0\r\n\r\n").first
        == b"HTTP/1.1 200 "
    )


def test_both_ways_alternate_on_one_connection() -> None:
    service = Service()
    chunked, nothing = HEAD + b"Transfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n", b"HTTP/1.1 204 -\r\n\r\n"
    for _ in range(3):
        for pieces in ([OK], [chunked], [OK], [OK[:30], OK[30:]], [nothing], [b"HTTP/1.1 100 -\r\n\r\n", OK], [OK]):
            read = service.says(*pieces)
            assert (read.body, read.failed, read.kept) == (b"" if pieces == [nothing] else b"ok", False, True)
        assert service.says(OK[:-2], method="HEAD")[5:] == (b"", False, False, True)
    assert service.taken == 9
    assert service.says(OK, method="HEAD")[5:] == (b"", False, False, False)


@pytest.mark.parametrize("more", [b"H", b"HTTP/1.1 200 OK\r\nX: ", b"\x00"])
@pytest.mark.parametrize("apart", [False, True])
def test_who_says_more_than_an_answer_is_not_asked_again(more: bytes, apart: bool) -> None:
    """What it has begun to say would become part of the next answer, or the parser's idea of it."""
    read = Service().says(*([OK, more] if apart else [OK + more]))
    assert (read.status, read.body, read.kept) == (200, b"ok", False)


_BYTES = st.sampled_from(
    [b"\r", b"\n", b"\r\n", b" ", b"\t", b":", b",", b"\x00", b"\x7f", b"\xff", b"0", b"2", b"x", b""]
)
_EDITS = st.lists(st.tuples(st.integers(0, 150), st.integers(0, 3), _BYTES), max_size=2)
_FIRST = st.sampled_from([b"HTTP/1.1 200 OK"] * 6 + [b"HTTP/1.1 304 -", b"HTTP/1.0 200 OK", b"HTTP/1.1 200"])
_PLAIN = [b"X: a", b"Date: d", b"Connection: keep-alive", b"Keep-Alive: timeout=5", b"Set-Cookie: a=b", b"X: \xe4"]
_LINES = st.sampled_from(
    _PLAIN * 6
    + [b"Connection: close", b"connection: x", b"Content-Length: 2", b"Content-Length: 3", b"content-length: 2", b"X:a",
       b"Transfer-Encoding: chunked", b"Upgrade: h2c", b"Upgrade: ", b"Proxy-Connection: close", b" folded"]
)  # fmt: skip
_LENGTH = st.sampled_from([[b"Content-Length: 2"]] * 5 + [[]])
_CUT = st.just(0) | st.just(0) | st.integers(0, 150)
_BODY = st.sampled_from([b"ok"] * 5 + [b"", b"oka"])


@st.composite
def _answers(draw: st.DrawFn) -> bytes:
    """Mostly plain ones, in which some bytes are replaced."""
    lines = [draw(_FIRST), *draw(st.lists(_LINES, max_size=4)), *draw(_LENGTH), b""]
    answer = b"\r\n".join([*lines, draw(_BODY)])
    for at, length, new in draw(_EDITS):
        at %= len(answer) or 1
        answer = answer[:at] + new + answer[at + length :]
    return answer


@settings(derandomize=True, deadline=None)
@given(st.lists(st.tuples(_answers(), _CUT), min_size=1, max_size=4))
@example([(OK, 0), (OK, 5), (OK, 0)])
def test_whatever_comes_is_read_as_the_parser_reads_it(said: list[tuple[bytes, int]]) -> None:
    same(*([[answer[:at], answer[at:]] if 0 < at < len(answer) else [answer] for answer, at in said if answer]), [OK])


@settings(derandomize=True, deadline=None)
@given(st.binary(max_size=30))
def test_no_bytes_in_a_line_are_read_otherwise(value: bytes) -> None:
    for line in (b"X: " + value, b"X" + value + b": a", b"Connection: " + value, value):
        same([HEAD + line + b"\r\nContent-Length: 2\r\n\r\nok"], [OK])
    same([b"HTTP/1.1 200 " + value + b"\r\nContent-Length: 2\r\n\r\nok"], [OK])


def test_what_is_remembered_of_lines_is_bounded_and_never_what_comes_once() -> None:
    headers._LINES.clear()
    for number in range(3000):
        same([HEAD + b"X: %d\r\nETag: %d\r\nset-cookie: %d\r\nContent-Length: 2\r\n\r\nok" % ((number,) * 3)])
    assert len(headers._LINES) <= 1000
    assert b"X: 2999" in headers._LINES
    assert not [line for line in headers._LINES if line.lower().startswith((b"etag", b"set-cookie"))]
    for line in (b"X: " + b"x" * 1000, b"Connection: close," + b"x" * 1000):
        assert to_caller([line]) == to_caller([line])
        assert line not in headers._LINES
