from typing import Any

import pytest
from aiohttp import hdrs
from aiohttp.test_utils import make_mocked_request
from multidict import CIMultiDict

from services.gateway import headers as hygiene
from services.gateway.headers import Client, check_head, client_of, target_of, to_caller, to_service
from shared.errors import Malformed

CLIENT = Client("203.0.113.7", "https", "tenfold.example")


def request(*pairs: tuple[str, str], path: str = "/api/v1/media") -> Any:
    return make_mocked_request("GET", path, headers=CIMultiDict(pairs))


def test_headers_named_in_connection_go_before_ours_are_added() -> None:
    """A caller that names our headers in `Connection` does not get rid of them."""
    outgoing = to_service(
        request(("Connection", "close, X-Request-Id, X-Forwarded-For, x-custom"), ("X-Custom", "1"), ("Accept", "a")),
        CLIENT,
        {"X-Request-Id": "ours"},
    )
    assert outgoing.getall("X-Request-Id") == ["ours"]
    assert outgoing.getall("X-Forwarded-For") == ["203.0.113.7"]
    assert outgoing["X-Forwarded-Proto"] == "https"
    assert outgoing["X-Forwarded-Host"] == "tenfold.example"
    assert "X-Custom" not in outgoing
    assert "Connection" not in outgoing
    assert outgoing["Accept"] == "a"


@pytest.mark.parametrize(
    "name",
    ["X-User-Id", "x-user-role", "X_User_Id", "X-Forwarded-For", "X-Forwarded-Prefix", "Forwarded", "X-Real-IP", "Via",
     "X-Principal", "X-Auth-Request-Email", "True-Client-IP", "Transfer-Encoding", "TE", "Keep-Alive", "Expect", "Host",
     "X-HTTP-Method-Override", "Proxy-Connection", "baggage", "Request-Timeout"],
)  # fmt: skip
def test_what_only_we_may_say_is_dropped(name: str) -> None:
    assert "forged" not in to_service(request((name, "forged")), CLIENT, {}).values()


def test_repeated_headers_stay_repeated_and_in_order() -> None:
    outgoing = to_service(request(("Accept", "a"), ("X-A", "1"), ("Accept", "b")), CLIENT, {})
    assert outgoing.getall("Accept") == ["a", "b"]


def test_answers_lose_what_is_the_hops() -> None:
    headers = [
        ("Connection", "X-A"), ("X-A", "1"), ("Server", "s"), ("Transfer-Encoding", "chunked"),
        ("Set-Cookie", "a=1"), ("Set-Cookie", "b=2"), ("ETag", '"v1"'), ("Content-Length", "3"),
    ]  # fmt: skip
    assert list(to_caller(headers).items()) == [
        ("Set-Cookie", "a=1"), ("Set-Cookie", "b=2"), ("ETag", '"v1"'), ("Content-Length", "3")
    ]  # fmt: skip


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
    asked = request(("X-Forwarded-For", forwarded)).clone(remote="peer")
    assert client_of(asked, trusted).address == address


def test_scheme_and_host_are_believed_to_our_proxies_only() -> None:
    pairs = (("Host", "here"), ("X-Forwarded-Proto", "https"), ("X-Forwarded-Host", "there"))
    assert client_of(request(*pairs), 0)[1:] == ("http", "here")
    assert client_of(request(*pairs), 1)[1:] == ("https", "there")
    assert client_of(request(("Host", "here"), ("X-Forwarded-Proto", "gopher")), 1).scheme == "http"


@pytest.mark.parametrize("name", [hdrs.HOST, hdrs.CONTENT_LENGTH, hdrs.AUTHORIZATION])
def test_what_must_be_there_once_is_refused_twice(name: str) -> None:
    with pytest.raises(Malformed):
        check_head(request((name, "1"), (name, "2")))


def test_two_framings_are_refused() -> None:
    with pytest.raises(Malformed):
        check_head(request(("Content-Length", "1"), ("Transfer-Encoding", "chunked")))


@pytest.mark.parametrize(
    "path",
    ["/api/../x", "/api/%2e%2e/x", "/api/%2E%2e", "/api/..%2fx", "/api/./x", "/api/%5c..%5cx", "/a%00", "/a%0d%0ab",
     "/a%7f"],
)  # fmt: skip
def test_climbing_and_cutting_paths_are_refused(path: str) -> None:
    with pytest.raises(Malformed):
        target_of(request(path=path))


@pytest.mark.parametrize("path", ["/a%2Fb?x=..%2f&y=+%20", "/a..b/...", "/%c3%a4", "/a?", "/a/.hidden"])
def test_other_paths_go_on_as_they_came(path: str) -> None:
    assert target_of(request(path=path)) == path


@pytest.mark.parametrize(
    ("cookie", "token"),
    [("tenfold_consistency=a-1f.b-2", "a-1f.b-2"), ("tenfold_consistency=A b", None), ("other=1", None), ("", None)],
)
def test_the_consistency_cookie_is_taken_where_it_can_be_one(cookie: str, token: str | None) -> None:
    assert hygiene.consistency_cookie(request(("Cookie", cookie))) == token
