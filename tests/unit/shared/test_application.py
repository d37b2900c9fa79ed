"""Decoding and its errors, as callers see them."""

from typing import Annotated
from uuid import UUID

import msgspec
import pytest
from aiohttp.test_utils import make_mocked_request

from shared.application import Access, Call, Reply, Route, _query_value, decode_body
from shared.errors import InvalidInput, Malformed
from shared.openapi import document
from shared.paging import Page, PageQuery, page


class Line(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    sku: str
    count: Annotated[int, msgspec.Meta(ge=1)]


class Order(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    name: Annotated[str, msgspec.Meta(min_length=2)]
    lines: list[Line]
    note: str | None = None


def pointers(raw: bytes) -> list[str]:
    with pytest.raises(InvalidInput) as raised:
        decode_body(raw, Order)
    return [error.pointer for error in raised.value.errors]


def test_a_good_body_is_decoded() -> None:
    assert decode_body(b'{"name":"ab","lines":[{"sku":"x","count":2}]}', Order) == Order("ab", [Line("x", 2)])


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (b"{}", ["/name", "/lines"]),
        (b'{"name":"ab"}', ["/lines"]),
        (b'{"name":"a","lines":[]}', ["/name"]),
        (b'{"name":"ab","lines":[{"sku":"x","count":0}]}', ["/lines/0/count"]),
        (b'{"name":"ab","lines":[{"sku":"x"}]}', ["/lines/0/count"]),
        (b'{"name":"ab","lines":[{"sku":"x","count":1,"colour":"red"}]}', ["/lines/0/colour"]),
        (b'{"name":1,"lines":2,"extra":3}', ["/extra", "/name", "/lines"]),
        (b"[]", [""]),
        (b"null", [""]),
    ],
)
def test_every_wrong_field_is_named(raw: bytes, expected: list[str]) -> None:
    assert pointers(raw) == expected


@pytest.mark.parametrize("raw", [b"", b"{", b'{"name":"ab"', b"\xff\xfe", b'{"name":"ab"}x', b'{"name":"\xff"}'])
def test_what_is_no_json_is_malformed(raw: bytes) -> None:
    with pytest.raises(Malformed):
        decode_body(raw, Order)


class Handlers:
    async def get(self, call: Call, order_id: UUID) -> Reply[Order]:
        """Get an order"""
        raise NotImplementedError

    async def list(self, call: Call, query: PageQuery) -> Reply[Page[Order]]:
        raise NotImplementedError

    async def make(self, call: Call, body: Order) -> Reply[Order]:
        raise NotImplementedError

    async def drop(self, call: Call, order_id: UUID) -> Reply[None]:
        raise NotImplementedError


def test_openapi_comes_from_the_handlers_signatures() -> None:
    h = Handlers()
    made = document(
        "Orders",
        "1",
        [
            Route("GET", "/orders/{order_id}", h.get),
            Route("DELETE", "/orders/{order_id}", h.drop, Access.ADMIN),
            Route("GET", "/orders", h.list, Access.PUBLIC),
            Route("POST", "/orders", h.make, status=201),
        ],
    )
    get = made["paths"]["/orders/{order_id}"]["get"]
    assert get["summary"] == "Get an order"
    assert get["parameters"][0]["schema"] == {"type": "string", "format": "uuid"}
    assert get["security"] == [{"token": []}]
    assert "security" not in made["paths"]["/orders"]["get"]
    assert {p["name"] for p in made["paths"]["/orders"]["get"]["parameters"]} == {"limit", "cursor"}
    assert "201" in made["paths"]["/orders"]["post"]["responses"]
    assert "204" in made["paths"]["/orders/{order_id}"]["delete"]["responses"]
    assert set(made["components"]["schemas"]) >= {"Order", "Line", "Problem"}


def test_a_handler_that_does_not_fit_its_path_is_refused_at_start() -> None:
    with pytest.raises(TypeError, match="order_id"):
        _ = Route("GET", "/orders/{id}", Handlers().get).signature


def test_a_page_tells_where_the_next_begins() -> None:
    ids = [UUID(int=n) for n in (5, 4, 3)]
    query = PageQuery(limit=2)
    first = page(ids, query, str, lambda i: i)
    assert first.items == [str(ids[0]), str(ids[1])]
    assert PageQuery(limit=2, cursor=first.next_cursor).before() == ids[1]
    assert page(ids[2:], query, str, lambda i: i).next_cursor is None


@pytest.mark.parametrize("cursor", ["", "x", "ü" * 22, "A" * 21, "A" * 23])
def test_foreign_cursors_are_invalid_input(cursor: str) -> None:
    with pytest.raises(InvalidInput):
        PageQuery(cursor=cursor).before()


@pytest.mark.parametrize("where", [b"%s", b'{"name":%s}', b'{"unknown":%s}'])
def test_a_body_nested_too_deeply_is_malformed(where: bytes) -> None:
    with pytest.raises(Malformed, match="nested"):
        decode_body(where % (b"[" * 30_000 + b"]" * 30_000), Order)


def test_a_query_parameter_given_twice_is_refused_by_name() -> None:
    assert _query_value(make_mocked_request("GET", "/?limit=5"), PageQuery) == PageQuery(limit=5)
    with pytest.raises(InvalidInput) as raised:
        _query_value(make_mocked_request("GET", "/?limit=1&limit=2&cursor=x"), PageQuery)
    assert [error.pointer for error in raised.value.errors] == ["?limit"]
