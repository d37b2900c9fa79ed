"""What the gateway answers itself."""

import asyncio
import re

import aiohttp
import pytest
from aiohttp import web

from tests.backing import Backing
from tests.integration.gateway.conftest import Keys, World


async def service(request: web.Request) -> web.Response:
    """All three services in one, as far as the gateway asks them something."""
    if request.path == "/openapi.json":
        return web.json_response(
            {
                "openapi": "3.1.0",
                "info": {"title": "x", "version": "1"},
                "paths": {
                    "/api/v1/media": {"get": {"operationId": "list_get", "responses": {"200": {"description": "OK"}}}},
                    "/internal": {"get": {"operationId": "secret_get", "responses": {}}},
                },
                "components": {"schemas": {}},
            }
        )
    if "Authorization" not in request.headers:
        return web.Response(status=401)
    answers = {
        "/api/v1/users/me": {"id": "1", "display_name": "Ann", "token": request.headers.get("Consistency-Token")},
        "/api/v1/media": {"items": [{"id": "m"}], "next_cursor": None},
        "/api/v1/notifications": {"items": [], "next_cursor": None, "unread": 3},
    }
    return web.json_response(answers[request.path])


async def down(_request: web.Request) -> web.Response:
    return web.Response(status=503)


async def test_home_is_composed(world: World, http: aiohttp.ClientSession, keys: Keys) -> None:
    door = await world.in_front_of(service)
    headers = {**keys.bearer(), "Cookie": "tenfold_consistency=a-1"}
    async with http.get(f"{door}/api/v1/home", headers=headers) as answer:
        assert answer.status == 200
        assert await answer.json() == {
            "user": {"id": "1", "display_name": "Ann", "token": "a-1"},
            "recent_media": [{"id": "m"}],
            "unread": 3,
            "degraded": [],
        }


async def test_home_is_partial_when_a_part_is_down(world: World, http: aiohttp.ClientSession, keys: Keys) -> None:
    whole, broken = await world.service(service), await world.service(down)
    door = await world.gateway(whole, upstream={"media": (broken,), "notifier": ("http://127.0.0.1:1",)})
    async with http.get(f"{door}/api/v1/home", headers=keys.bearer()) as answer:
        home = await answer.json()
    assert home["user"]["display_name"] == "Ann"
    assert (home["recent_media"], home["unread"]) == ([], None)
    assert home["degraded"] == ["media", "notifier"]


async def test_the_document_is_merged_from_what_is_public(world: World, http: aiohttp.ClientSession) -> None:
    door = await world.in_front_of(service)
    async with http.get(f"{door}/api/openapi.json") as answer:
        document = await answer.json()
    assert {"/api/v1/home", "/api/v1/media", "/api/v1", "/api/openapi.json"} == set(document["paths"])
    assert document["paths"]["/api/v1/media"]["get"]["operationId"] == "media_list_get"
    assert document["paths"]["/api/v1/media"]["get"]["tags"] == ["media"]


async def test_the_document_does_without_a_service_that_is_down(world: World, http: aiohttp.ClientSession) -> None:
    door = await world.in_front_of(down)
    async with http.get(f"{door}/api/openapi.json") as answer:
        assert answer.status == 200
        assert "/api/v1/home" in (await answer.json())["paths"]


async def test_the_index_says_where_to_go(world: World, http: aiohttp.ClientSession) -> None:
    door = await world.in_front_of(service)
    async with http.get(f"{door}/api/v1") as answer:
        index = await answer.json()
        assert answer.headers["RateLimit-Policy"] == '"default";q=200;w=4'
    assert index["links"]["documentation"] == "/api/docs"


@pytest.mark.parametrize("page", ["/", "/api/docs"])
async def test_pages_load_nothing_foreign_and_their_files_are_there(
    world: World, http: aiohttp.ClientSession, page: str
) -> None:
    door = await world.in_front_of(service)
    async with http.get(door + page, headers={"Accept-Encoding": "identity"}) as answer:
        html = await answer.text()
        assert answer.status == 200
        assert "default-src 'self'" in answer.headers["Content-Security-Policy"]
        assert answer.headers["Cache-Control"] == "no-cache"
        for name in ("X-Frame-Options", "Referrer-Policy", "X-Content-Type-Options", "X-Request-Id"):
            assert name in answer.headers
        assert "Server" not in answer.headers
    assert not re.search(r"""(?:src|href)=["'](?:https?:)?//""", html)
    assert not re.search(r"<script(?![^>]*\ssrc=)|\son\w+=|\sstyle=", html)
    named = re.findall(r'"(/static/[^"]+)"', html)
    assert len(named) >= 3
    for name in named:
        async with http.get(door + name) as answer:
            assert answer.status == 200
            assert answer.headers["Cache-Control"].endswith("immutable")
            tag = answer.headers["ETag"]
        async with http.get(door + name, headers={"If-None-Match": tag}) as answer:
            assert (answer.status, await answer.read()) == (304, b"")
        async with http.head(door + name) as answer:
            assert answer.status == 200


async def test_anything_else_is_a_404_problem(world: World, http: aiohttp.ClientSession) -> None:
    door = await world.in_front_of(service)
    for path in (
        "/nothing",
        "/api/v2/users",
        "/static/nothing.js",
        "/static/..%2fapp.py",
        "/api/v1/usersx",
        "/metrics",
    ):
        async with http.get(door + path) as answer:
            assert answer.status == 404, path
            assert answer.content_type == "application/problem+json"
    for path in ("/robots.txt", "/favicon.ico"):
        async with http.get(door + path) as answer:
            assert answer.status == 200


async def test_other_sites_may_call_only_where_that_is_configured(world: World, http: aiohttp.ClientSession) -> None:
    asks = {"Origin": "https://app.example.com", "Access-Control-Request-Method": "POST"}
    door = await world.in_front_of(service, cors_origins=("https://app.example.com",))
    async with http.options(f"{door}/api/v1/users", headers=asks) as answer:
        assert answer.status == 204
        assert answer.headers["Access-Control-Allow-Origin"] == "https://app.example.com"
        assert "Authorization" in answer.headers["Access-Control-Allow-Headers"]
    async with http.get(f"{door}/api/v1/media", headers={"Origin": "https://app.example.com"}) as answer:
        assert answer.status == 401  # errors can be read, too
        assert answer.headers["Access-Control-Allow-Origin"] == "https://app.example.com"
    async with http.get(f"{door}/api/v1", headers={"Origin": "https://evil.example"}) as answer:
        assert "Access-Control-Allow-Origin" not in answer.headers
    closed = await world.in_front_of(service)
    async with http.options(f"{closed}/api/v1/users", headers=asks) as answer:
        assert answer.status != 204
        assert "Access-Control-Allow-Origin" not in answer.headers


async def ok(_request: web.Request) -> web.Response:
    return web.Response(text="ok")


async def test_credentials_are_limited_more_than_the_rest(
    world: World, http: aiohttp.ClientSession, keys: Keys
) -> None:
    door = await world.in_front_of(ok, limit_credentials="3/60")
    statuses = []
    # Encoded otherwise it is the same route, and counts the same.
    for path in ("/api/v1/sessions", "/api/v1/sess%69ons", "/api/v1/users", "/api/v1/sessions"):
        async with http.post(door + path) as answer:
            statuses.append(answer.status)
            last = answer.headers
    assert statuses == [200, 200, 200, 429]
    assert int(last["Retry-After"]) in range(1, 61)
    assert last["RateLimit-Policy"] == '"credentials";q=3;w=60'
    assert last["RateLimit"].startswith('"credentials";r=0;t=')
    async with http.get(f"{door}/api/v1/media", headers=keys.bearer()) as answer:
        assert answer.status == 200
        assert answer.headers["RateLimit"].startswith('"default";r=199;')


async def test_users_behind_one_address_do_not_share_a_limit(
    world: World, http: aiohttp.ClientSession, keys: Keys
) -> None:
    door = await world.in_front_of(ok, limit_default="2/60")
    for _ in range(2):
        headers = keys.bearer()
        statuses = []
        for _ in range(3):
            async with http.get(f"{door}/api/v1/media", headers=headers) as answer:
                statuses.append(answer.status)
        assert statuses == [200, 200, 429]


async def test_addresses_count_behind_our_own_proxies(world: World, http: aiohttp.ClientSession) -> None:
    door = await world.in_front_of(ok, limit_credentials="1/60", trusted_proxies=1)

    async def log_in(forwarded: str) -> int:
        async with http.post(f"{door}/api/v1/sessions", headers={"X-Forwarded-For": forwarded}) as answer:
            return answer.status

    assert await log_in("203.0.113.1") == 200
    assert await log_in("203.0.113.2") == 200
    assert await log_in("198.51.100.9, 203.0.113.1") == 429  # what the caller wrote before our proxy does not count
    assert await log_in("2001:db8::1") == 200
    assert await log_in("2001:db8::2") == 429  # the same /64


async def test_two_gateways_share_a_limit_in_redis(
    world: World, http: aiohttp.ClientSession, keys: Keys, backing: Backing
) -> None:
    behind = await world.service(ok)
    doors = [await world.gateway(behind, limit_default="3/60", redis_url=backing.redis) for _ in range(2)]
    headers = keys.bearer()

    async def status(number: int) -> int:
        async with http.get(f"{doors[number % 2]}/api/v1/media", headers=headers) as answer:
            return answer.status

    assert sorted(await asyncio.gather(*map(status, range(4)))) == [200, 200, 200, 429]
