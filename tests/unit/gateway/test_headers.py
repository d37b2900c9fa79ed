import pytest
from multidict import CIMultiDict

from services.gateway import headers as hygiene
from services.gateway.errors import AmbiguousRequest
from services.gateway.headers import ODD, Client, Seen, block, check_head, client_of, climbs, to_caller, to_service


def raw(*pairs: tuple[str, str]) -> list[tuple[bytes, bytes]]:
    return [(name.encode(), value.encode()) for name, value in pairs]


def test_headers_named_in_connection_do_not_go_on() -> None:
    given = raw(("Connection", "close, x-custom"), ("X-Custom", "1"), ("connection", "X-B"), ("x-b", "1"), ("A", "a"))
    assert to_service(given) == [b"A: a"]


@pytest.mark.parametrize(
    "name",
    ["X-User-Id", "x-user-role", "X_User_Id", "X-Forwarded-For", "X-Forwarded-Prefix", "Forwarded", "X-Real-IP", "Via",
     "X-Principal", "X-Auth-Request-Email", "True-Client-IP", "Transfer-Encoding", "TE", "Keep-Alive", "Expect", "Host",
     "X-HTTP-Method-Override", "Proxy-Connection", "baggage", "Request-Timeout", "X-Request-Id", "traceparent",
     "Content-Length"],
)  # fmt: skip
def test_what_only_we_may_say_is_dropped(name: str) -> None:
    assert to_service(raw((name, "forged"))) == []


def test_repeated_headers_stay_repeated_and_in_order() -> None:
    assert to_service(raw(("Accept", "a"), ("X-A", "1"), ("accept", "b"))) == [b"Accept: a", b"X-A: 1", b"accept: b"]


def test_what_is_remembered_of_names_is_bounded() -> None:
    for number in range(3000):
        assert to_service(raw((f"X-{number}", "1"))) == [b"X-%d: 1" % number]
    assert len(hygiene._PASSES) <= 1000
    assert to_service(raw(("X-User-Id", "1"), ("a" * 1000, "1"))) == [b"a" * 1000 + b": 1"]


def test_answers_lose_what_is_the_hops_and_what_we_say_ourselves() -> None:
    given = [
        b"Connection: X-A", b"X-A: 1", b"Server: s", b"Transfer-Encoding: chunked", b"Date: d", b"Set-Cookie: a=1",
        b"Set-Cookie: b=2", b'ETag: "v1"', b"Content-Length: 3", b"RateLimit: x", b"Referrer-Policy: origin",
    ]  # fmt: skip
    lines, seen = to_caller(given)
    assert lines == [
        b"Date: d", b"Set-Cookie: a=1", b"Set-Cookie: b=2", b'ETag: "v1"', b"Content-Length: 3",
        b"Referrer-Policy: origin",
    ]  # fmt: skip
    assert seen == Seen.CONNECTION | Seen.DATE | Seen.CONTENT_LENGTH | Seen.REFERRER_POLICY | ODD


@pytest.mark.parametrize(
    ("trusted", "forwarded", "address"),
    [
        (0, "6.6.6.6", "peer"),
        (1, "203.0.113.1", "203.0.113.1"),
        (1, "6.6.6.6, 203.0.113.1", "203.0.113.1"),
        (2, "6.6.6.6, 203.0.113.1, 10.0.0.1", "203.0.113.1"),
        (2, "203.0.113.1", "203.0.113.1"),
        (1, "203.0.113.1:4711", "203.0.113.1"),
        (1, "[2001:db8::1]:4711", "2001:db8::1"),
        (1, "2001:db8::1", "2001:db8::1"),
        (1, "", "peer"),
        (1, " , ", "peer"),
    ],
)
def test_the_callers_address_is_counted_from_the_right(trusted: int, forwarded: str, address: str) -> None:
    assert client_of("peer", "http", CIMultiDict({"X-Forwarded-For": forwarded}), trusted).address == address


def test_scheme_and_host_are_believed_to_our_proxies_only() -> None:
    given = CIMultiDict({"Host": "here", "X-Forwarded-Proto": "https", "X-Forwarded-Host": "there"})
    assert client_of("peer", "http", given, 0) == Client("peer", "http", "here")
    assert client_of("peer", "http", given, 1)[1:] == ("https", "there")
    assert client_of("peer", "http", CIMultiDict({"X-Forwarded-Proto": "gopher"}), 1).scheme == "http"


def test_two_tokens_are_refused() -> None:
    with pytest.raises(AmbiguousRequest):
        check_head(CIMultiDict([("Authorization", "1"), ("authorization", "2")]))


def test_two_framings_are_refused() -> None:
    with pytest.raises(AmbiguousRequest):
        check_head(CIMultiDict([("Content-Length", "1"), ("Transfer-Encoding", "chunked")]))


@pytest.mark.parametrize(
    "path",
    ["/api/../x", "/api/%2e%2e/x", "/api/%2E%2e", "/api/..%2fx", "/api/./x", "/api/%5c..%5cx", "/a%00", "/a%0d%0ab",
     "/a%7f"],
)  # fmt: skip
def test_climbing_and_cutting_paths_are_found(path: str) -> None:
    assert climbs(path)


@pytest.mark.parametrize("path", ["/a%2Fb", "/a..b/...", "/%c3%a4", "/a", "/a/.hidden"])
def test_other_paths_go_on_as_they_came(path: str) -> None:
    assert not climbs(path)


@pytest.mark.parametrize(
    ("cookie", "token"),
    [
        ("tenfold_consistency=a-1f.b-2", "a-1f.b-2"),
        ('a=b; tenfold_consistency="a-1f" ; c=d', "a-1f"),
        ("tenfold_consistency=A b", None),
        ("xtenfold_consistency=a", None),
        ("other=1", None),
        ("", None),
    ],
)
def test_the_consistency_cookie_is_taken_where_it_can_be_one(cookie: str, token: str | None) -> None:
    assert hygiene.consistency_cookie(CIMultiDict({"Cookie": cookie})) == token


@pytest.mark.parametrize("line", [b"A: a\r\nX: y", b"A: a\nX: y", b"A: a\rb"])
def test_no_header_can_begin_a_line(line: bytes) -> None:
    assert block([b"A: a", b"B: b"]) == b"A: a\r\nB: b\r\n"
    with pytest.raises(ValueError, match="line break"):
        block([b"A: a", line])
