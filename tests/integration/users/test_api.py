import asyncio
from typing import Any, NoReturn

import msgspec
import pytest

from services.users.app import SERVICE
from services.users.keys import SigningKeys, UnreadableKeys
from services.users.settings import Settings
from shared.auth import TokenVerifier, parse_jwks
from shared.cache import Cache
from shared.clock import SystemClock
from shared.database import Database
from shared.errors import Unauthenticated, Unavailable
from shared.health import Health
from shared.testing import eventually
from tests.backing import Backing, connect
from tests.integration.users.people import ANN, log_in, register, token
from tests.serving import Api, serving


async def test_register_log_in_and_read_the_own_account(api: Api) -> None:
    made = await api.post("/api/v1/users", ANN)
    assert made.status == 201
    assert made.body["email"] == "ann@example.org"
    assert made.body.keys() == {
        "id", "email", "email_verified", "display_name", "bio", "locale", "role", "created_at", "updated_at", "version",
    }  # fmt: skip
    assert made.headers["Location"] == f"/api/v1/users/{made.body['id']}"
    session = await log_in(api)
    assert session.status == 201
    assert (session.body["token_type"], session.body["expires_in"]) == ("Bearer", 600)
    me = await api.get("/api/v1/users/me", token=session.body["access_token"])
    assert (me.status, me.body) == (200, made.body)


async def test_an_address_is_taken_once_however_it_is_written(api: Api) -> None:
    assert (await api.post("/api/v1/users", ANN)).status == 201
    again = await api.post("/api/v1/users", {**ANN, "email": "ANN@example.ORG "})
    assert (again.status, again.body["type"]) == (409, "urn:tenfold:error:address-taken")
    assert again.headers["Content-Type"] == "application/problem+json"


async def test_many_at_once_take_an_address_once(api: Api) -> None:
    answers = await asyncio.gather(*(api.post("/api/v1/users", ANN) for _ in range(10)))
    assert sorted(answer.status for answer in answers) == [201] + [409] * 9


@pytest.mark.parametrize(
    ("change", "pointer"),
    [
        ({"email": "nobody"}, "/email"),
        ({"email": "groß@straße.de"}, "/email"),
        ({"password": "short"}, "/password"),
        ({"password": "p" * 257}, "/password"),
        ({"password": "password1"}, "/password"),
        ({"display_name": " "}, "/display_name"),
        ({"display_name": "a\nb"}, "/display_name"),
        ({"role": "admin"}, "/role"),
        ({"email": None}, "/email"),
    ],
)
async def test_wrong_fields_are_named(api: Api, change: dict[str, object], pointer: str) -> None:
    answer = await api.post("/api/v1/users", {**ANN, **change})
    assert answer.status == 422
    assert [error["pointer"] for error in answer.body["errors"]] == [pointer]


async def test_what_the_database_cannot_take_is_refused_by_name(api: Api, sql: Any) -> None:
    await register(api)
    await sql.execute("UPDATE accounts SET role = 'admin'")
    access = await token(api)
    nul = "a\x00b@example.org"
    for method, path, body, pointer in (
        ("POST", "/api/v1/users", {**ANN, "email": nul}, "/email"),
        ("POST", "/api/v1/sessions", {"email": nul, "password": "x"}, "/email"),
        ("POST", "/api/v1/password-resets", {"email": nul}, "/email"),
        ("PATCH", "/api/v1/users/me", {"bio": nul}, "/bio"),
        ("PATCH", "/api/v1/users/me", {"display_name": nul}, "/display_name"),
        ("GET", "/api/v1/admin/users?query=%00", None, "?query"),
    ):
        answer = await api.call(method, path, body, token=access)
        assert (answer.status, [error["pointer"] for error in answer.body["errors"]]) == (422, [pointer]), path


async def test_foreign_bytes_in_headers_and_paths_are_no_error_of_ours(api: Api) -> None:
    host, port = api.base.removeprefix("http://").split(":")
    await register(api)
    body = msgspec.json.encode({"email": ANN["email"], "password": ANN["password"]})
    for line, headers, payload, status in (
        (b"POST /api/v1/sessions", b"X-Forwarded-For: \xff\xed\xa0\x80\r\nUser-Agent: \xff\r\n", body, b"201"),
        (b"PUT /api/v1/email-verifications/%ff%ed%a0%80", b"", b"", b"404"),
        (b"PUT /api/v1/email-verifications/%00", b"", b"", b"404"),
    ):
        reader, writer = await asyncio.open_connection(host, int(port))
        head = b"Host: x\r\nConnection: close\r\nContent-Type: application/json\r\nContent-Length: %d\r\n" % len(
            payload
        )
        writer.write(line + b" HTTP/1.1\r\n" + head + headers + b"\r\n" + payload)
        assert (await reader.readline()).split()[1] == status, line
        writer.close()


async def test_a_missing_field_is_named(api: Api) -> None:
    answer = await api.post("/api/v1/users", {"email": "ann@example.org"})
    assert answer.status == 422
    assert [error["pointer"] for error in answer.body["errors"]] == ["/password", "/display_name"]


async def test_malformed_json_is_400_and_another_type_415(api: Api) -> None:
    for body, content_type, status in (
        (b"{", "application/json", 400),
        (b"a=b", "application/x-www-form-urlencoded", 415),
    ):
        url = f"{api.base}/api/v1/users"
        async with api.http.post(url, data=body, headers={"Content-Type": content_type}) as response:
            assert response.status == status
            assert response.content_type == "application/problem+json"


async def test_wrong_credentials_look_the_same_whoever_is_meant(api: Api) -> None:
    await register(api)
    wrong, unknown = await log_in(api, password="something else"), await log_in(api, "nobody")
    assert (wrong.status, unknown.status) == (401, 401)
    assert wrong.body == unknown.body


@pytest.mark.parametrize("authorization", [None, "", "Bearer", "Bearer x", "Basic eDp5", "Bearer a.b.c"])
async def test_without_a_good_token_there_is_401(api: Api, authorization: str | None) -> None:
    headers = {} if authorization is None else {"authorization": authorization}
    for method, path in (("GET", "/users/me"), ("PATCH", "/users/me"), ("GET", "/sessions"), ("DELETE", "/sessions")):
        answer = await api.call(method, f"/api/v1{path}", **headers)
        assert answer.status == 401
        assert answer.headers["WWW-Authenticate"] == "Bearer"


async def test_an_expired_token_is_401(settings: Settings, backing: Backing) -> None:
    async with serving(SERVICE, msgspec.structs.replace(settings, access_token_seconds=1)) as api:
        access = await token(api)

        async def expired() -> bool:
            return (await api.get("/api/v1/users/me", token=access)).status == 401

        await eventually(expired)


async def test_a_refresh_token_is_spent_by_its_use(api: Api) -> None:
    await register(api)
    first = (await log_in(api)).body
    second = await api.post("/api/v1/sessions/refresh", {"refresh_token": first["refresh_token"]})
    assert second.status == 201
    assert second.body["refresh_token"] != first["refresh_token"]
    third = await api.post("/api/v1/sessions/refresh", {"refresh_token": second.body["refresh_token"]})
    assert third.status == 201


async def test_a_lost_answer_logs_nobody_out(api: Api) -> None:
    await register(api)
    first = (await log_in(api)).body["refresh_token"]
    answers = [await api.post("/api/v1/sessions/refresh", {"refresh_token": first}) for _ in range(2)]
    assert [answer.status for answer in answers] == [201, 201]
    assert len((await api.get("/api/v1/sessions", token=answers[1].body["access_token"])).body["items"]) == 1


async def test_a_stolen_refresh_token_ends_the_session_for_both(api: Api) -> None:
    await register(api)
    first = (await log_in(api)).body["refresh_token"]
    owner = await api.post("/api/v1/sessions/refresh", {"refresh_token": first})
    thief = await api.post("/api/v1/sessions/refresh", {"refresh_token": first}, user_agent="another")
    after = await api.post("/api/v1/sessions/refresh", {"refresh_token": owner.body["refresh_token"]})
    assert (owner.status, thief.status, after.status) == (201, 401, 401)


async def test_a_session_does_not_pile_up_what_it_has_spent(api: Api, settings: Settings, sql: Any) -> None:
    await register(api)
    tokens = (await log_in(api)).body
    for _ in range(3):
        tokens = (await api.post("/api/v1/sessions/refresh", {"refresh_token": tokens["refresh_token"]})).body
    assert await sql.fetchval("SELECT count(*) FROM refresh_tokens") == 4
    long_ago = settings.refresh_token_seconds + 1
    await sql.execute("UPDATE refresh_tokens SET spent_at = spent_at - make_interval(secs => $1)", long_ago)
    await api.post("/api/v1/sessions/refresh", {"refresh_token": tokens["refresh_token"]})
    assert await sql.fetchval("SELECT count(*) FROM refresh_tokens") == 2


async def test_sessions_are_listed_and_ended_by_their_owner_only(api: Api) -> None:
    ann, bob = await token(api, "ann"), await token(api, "bob")
    second = (await log_in(api, "ann")).body["access_token"]
    listed = (await api.get("/api/v1/sessions", token=ann)).body["items"]
    assert [s["current"] for s in listed] == [False, True]
    assert (await api.call("DELETE", f"/api/v1/sessions/{listed[0]['id']}", token=bob)).status == 404
    assert (await api.call("DELETE", f"/api/v1/sessions/{listed[0]['id']}", token=ann)).status == 204
    assert (await api.call("DELETE", "/api/v1/sessions/current", token=second)).status == 404
    assert (await api.call("DELETE", "/api/v1/sessions/current", token=ann)).status == 204


async def test_a_lost_update_is_refused(api: Api) -> None:
    access = await token(api)
    first = await api.call("PATCH", "/api/v1/users/me", {"bio": "one"}, token=access, if_match='"v1"')
    stale = await api.call("PATCH", "/api/v1/users/me", {"bio": "two"}, token=access, if_match='"v1"')
    assert (first.status, first.headers["ETag"], stale.status) == (200, '"v2"', 412)
    foreign = await api.call("PATCH", "/api/v1/users/me", {"bio": "two"}, token=access, if_match='"else"')
    assert foreign.status == 412


async def test_an_unchanged_account_is_not_sent_again(api: Api) -> None:
    access = await token(api)
    me = await api.get("/api/v1/users/me", token=access)
    again = await api.get("/api/v1/users/me", token=access, if_none_match=me.headers["ETag"])
    assert (again.status, again.body) == (304, b"")


async def test_a_profile_shows_no_private_field_and_every_change_at_once(api: Api) -> None:
    made = (await register(api)).body
    access = (await log_in(api)).body["access_token"]
    path = f"/api/v1/users/{made['id']}"
    for n in range(5):
        await api.call("PATCH", "/api/v1/users/me", {"bio": f"bio {n}"}, token=access)
        profile = await api.get(path)
        assert profile.body.keys() == {"id", "display_name", "bio", "created_at"}
        assert profile.body["bio"] == f"bio {n}"
    assert (await api.get("/api/v1/users/00000000-0000-7000-8000-000000000000")).status == 404
    assert (await api.get("/api/v1/users/not-an-id")).status == 404


async def test_a_change_is_seen_by_others_though_its_invalidation_was_lost(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def lost(*_: object) -> None:
        pass

    monkeypatch.setattr(Cache, "invalidate", lost)
    made = (await register(api)).body
    access = (await log_in(api)).body["access_token"]
    other = Api(api.base, api.http)  # without the writer's token

    async def bio() -> str:
        return str((await other.get(f"/api/v1/users/{made['id']}")).body["bio"])

    assert await bio() == ""
    await api.call("PATCH", "/api/v1/users/me", {"bio": "new"}, token=access)

    async def healed() -> bool:
        return await bio() == "new"

    await eventually(healed, every=0.05)


async def test_the_same_registration_sent_again_gets_the_same_answer(api: Api) -> None:
    answers = [await api.post("/api/v1/users", ANN, idempotency_key="abc") for _ in range(3)]
    assert [answer.status for answer in answers] == [201] * 3
    assert answers[0].body == answers[1].body == answers[2].body
    other = await api.post("/api/v1/users", {**ANN, "email": "bob@example.org"}, idempotency_key="abc")
    assert other.status == 422
    other = await api.post("/api/v1/users", {**ANN, "password": "another horse battery"}, idempotency_key="abc")
    assert (other.status, other.body["type"]) == (422, "urn:tenfold:error:idempotency-key-reused")
    assert (await api.post("/api/v1/users", ANN, idempotency_key="x" * 256)).status == 422


async def test_instances_share_their_keys_and_the_key_set_verifies_their_tokens(
    settings: Settings, backing: Backing
) -> None:
    async with serving(SERVICE, settings) as one, serving(SERVICE, settings) as two:
        access = await token(one)
        assert (await two.get("/api/v1/users/me", token=access)).status == 200
        key_set = await two.get("/.well-known/jwks.json")
        keys = parse_jwks(msgspec.json.encode(key_set.body))

        class Published:
            async def public_key(self, key_id: str) -> object:
                return keys.get(key_id)

        verifier = TokenVerifier(Published())  # type: ignore[arg-type]
        assert (await verifier.verify(access)).role == "user"
        with pytest.raises(Unauthenticated):
            await verifier.verify(access[:-8] + "AAAAAAAA")


async def test_another_secret_is_told_at_start(settings: Settings, backing: Backing) -> None:
    async with serving(SERVICE, settings):
        pass
    with pytest.raises(UnreadableKeys, match="USERS_SIGNING_KEY_SECRET"):
        async with serving(SERVICE, msgspec.structs.replace(settings, signing_key_secret="t" * 32)):
            pass


async def test_the_private_key_is_not_readable_in_the_database(settings: Settings, backing: Backing) -> None:
    async with serving(SERVICE, settings):
        connection = await connect(settings.database_url)
        try:
            stored = await connection.fetchval("SELECT private_key FROM signing_keys")
        finally:
            await connection.close()
        assert stored.startswith(b"gAAAA")  # a Fernet token


async def test_the_keys_are_known_while_the_database_is_away(
    settings: Settings, health: Health, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with (
        Database.opened("users", settings, health) as db,
        SigningKeys.opened(db, settings, SystemClock()) as keys,
    ):
        known = await keys.public_keys()
        asked = 0

        def away() -> NoReturn:
            nonlocal asked
            asked += 1
            raise Unavailable("the database is away")

        monkeypatch.setattr(db, "transaction", away)
        monkeypatch.setattr(keys, "_loaded_at", float("-inf"))
        assert await keys.public_keys() == known
        assert await keys.public_key("forged") is None
        assert await keys.public_key("forged too") is None
        assert asked == 1
