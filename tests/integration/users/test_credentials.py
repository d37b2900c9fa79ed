"""Links by email, passwords, and what slows down who guesses them."""

import asyncio
from typing import Any

import msgspec
import pytest

from services.users.events import (
    UserPasswordChanged,
    UserPasswordResetRequested,
    UserRegistered,
    UserUpdated,
    UserVerificationRequested,
)
from services.users.passwords import Passwords
from services.users.settings import Settings
from shared.testing import eventually
from tests.backing import Backing
from tests.integration.users.people import PASSWORD, Spy, done_or_waiting, log_in, register, token
from tests.serving import Api, serving

NEW = "another horse battery"
EMAIL = {"email": "ann@example.org"}


async def test_the_link_of_the_welcome_proves_the_address_once(api: Api, spy: Spy) -> None:
    access = await token(api)
    link = f"/api/v1/email-verifications/{await spy.token(UserRegistered)}"
    assert (await api.call("PUT", link)).status == 204
    me = await api.get("/api/v1/users/me", token=access)
    assert (me.body["email_verified"], me.body["version"]) == (True, 2)
    told = [await spy.next(UserRegistered), await spy.next(UserUpdated)]
    assert [event.email_verified for event in told] == [False, True]  # type: ignore[attr-defined]
    again = await api.call("PUT", link)
    assert (again.status, again.body["type"]) == (404, "urn:tenfold:error:link-not-valid")


async def test_another_link_can_be_had_a_few_times(api: Api, spy: Spy, sql: Any) -> None:
    access = await token(api)
    for _ in range(5):
        assert (await api.post("/api/v1/email-verifications", token=access)).status == 202
    second = await spy.token(UserVerificationRequested, after=1)
    assert await sql.fetchval("SELECT count(*) FROM one_time_tokens") == 3
    assert (await api.call("PUT", f"/api/v1/email-verifications/{second}")).status == 204
    assert await sql.fetchval("SELECT count(*) FROM one_time_tokens") == 0
    assert (await api.post("/api/v1/email-verifications", token=access)).status == 202
    assert await sql.fetchval("SELECT count(*) FROM one_time_tokens") == 0  # there is nothing left to prove
    assert (await api.post("/api/v1/email-verifications")).status == 401


async def test_a_reset_ends_all_sessions_and_its_link_works_once(api: Api, spy: Spy) -> None:
    await register(api)
    session = (await log_in(api)).body
    assert (await api.post("/api/v1/password-resets", EMAIL)).status == 202
    link = f"/api/v1/password-resets/{await spy.token(UserPasswordResetRequested)}"
    weak = await api.call("PUT", link, {"new_password": "password1"})
    assert (weak.status, weak.body["errors"][0]["pointer"]) == (422, "/new_password")
    answers = await asyncio.gather(*(api.call("PUT", link, {"new_password": NEW}) for _ in range(5)))
    assert sorted(answer.status for answer in answers) == [204, 404, 404, 404, 404]
    refreshed = await api.post("/api/v1/sessions/refresh", {"refresh_token": session["refresh_token"]})
    assert refreshed.status == 401
    assert (await log_in(api)).status == 401
    access = (await log_in(api, password=NEW)).body["access_token"]
    assert (await api.get("/api/v1/users/me", token=access)).body["email_verified"]
    await spy.next(UserPasswordChanged)


async def test_a_reset_and_a_change_of_the_password_do_not_wait_for_each_other(api: Api, spy: Spy, sql: Any) -> None:
    await register(api)
    await api.post("/api/v1/password-resets", EMAIL)
    link = f"/api/v1/password-resets/{await spy.token(UserPasswordResetRequested)}"
    async with sql.transaction():  # the statements of a change, in its order
        await sql.execute("SELECT FROM accounts FOR UPDATE")
        reset = asyncio.ensure_future(api.call("PUT", link, {"new_password": NEW}))
        await done_or_waiting(reset, sql)
        await sql.execute("DELETE FROM one_time_tokens WHERE purpose = 'reset_password'")
    assert (await reset).status == 404


async def test_a_reset_is_answered_the_same_whoever_is_meant(api: Api, spy: Spy, sql: Any) -> None:
    await register(api)
    for email in ("nobody@example.org", "no address at all", "ann@example.org"):
        answer = await api.post("/api/v1/password-resets", {"email": email})
        assert (answer.status, answer.body) == (202, b"")
    await spy.next(UserPasswordResetRequested)

    async def worked_off() -> bool:
        count: int = await sql.fetchval("SELECT count(*) FROM password_reset_requests")
        return count == 0

    await eventually(worked_off)
    assert await sql.fetchval("SELECT count(*) FROM one_time_tokens WHERE purpose = 'reset_password'") == 1
    assert (await api.post("/api/v1/password-resets", {"email": 1})).status == 422
    assert (await api.call("PUT", "/api/v1/password-resets/x", {"new_password": NEW})).status == 404


async def test_links_expire_and_tokens_lie_nowhere_in_the_clear(api: Api, spy: Spy, sql: Any) -> None:
    await register(api)
    link = await spy.token(UserRegistered)
    assert link not in msgspec.json.encode(await spy.next(UserRegistered)).decode()
    assert not await sql.fetchval("SELECT count(*) FROM one_time_tokens WHERE digest = $1", link.encode())
    await sql.execute("UPDATE one_time_tokens SET expires_at = now()")
    assert (await api.call("PUT", f"/api/v1/email-verifications/{link}")).status == 404


async def test_a_link_for_one_purpose_is_no_good_for_another(api: Api, spy: Spy) -> None:
    await register(api)
    link = await spy.token(UserRegistered)
    assert (await api.call("PUT", f"/api/v1/password-resets/{link}", {"new_password": NEW})).status == 404


async def test_changing_the_password_ends_the_other_sessions(api: Api, spy: Spy) -> None:
    access = await token(api)
    other = (await log_in(api)).body["refresh_token"]
    path = "/api/v1/users/me/password"
    wrong = await api.call("PUT", path, {"current_password": "wrong", "new_password": NEW}, token=access)
    assert (wrong.status, wrong.body["errors"][0]["pointer"]) == (422, "/current_password")
    body = {"current_password": PASSWORD, "new_password": NEW}
    assert (await api.call("PUT", path, {**body, "new_password": "password1"}, token=access)).status == 422
    assert (await api.call("PUT", path, body)).status == 401
    assert (await api.call("PUT", path, body, token=access)).status == 204
    await spy.next(UserPasswordChanged)
    assert (await api.post("/api/v1/sessions/refresh", {"refresh_token": other})).status == 401
    listed = (await api.get("/api/v1/sessions", token=access)).body["items"]
    assert [session["current"] for session in listed] == [True]
    assert ((await log_in(api)).status, (await log_in(api, password=NEW)).status) == (401, 201)


async def test_a_login_brings_the_hash_up_to_the_parameters(settings: Settings, backing: Backing, sql: Any) -> None:
    async with serving(Spy(settings).service, settings) as api:
        await register(api)
    before = await sql.fetchval("SELECT password_hash FROM accounts")
    async with serving(Spy(settings).service, msgspec.structs.replace(settings, argon2_time=2)) as api:
        assert (await log_in(api, password="wrong password")).status == 401
        assert await sql.fetchval("SELECT password_hash FROM accounts") == before
        assert (await log_in(api)).status == 201
        after = await sql.fetchval("SELECT password_hash FROM accounts")
        assert (",t=1," in before, ",t=2," in after) == (True, True)
        assert (await log_in(api)).status == 201


@pytest.mark.parametrize(
    ("change", "status"),
    [("UPDATE accounts SET password_hash = ''", 401), ("UPDATE accounts SET disabled = true", 403),
     ("DELETE FROM accounts", 401)],
    ids=["another password", "disabled", "deleted"],
)  # fmt: skip
async def test_a_login_that_began_before_a_change_opens_no_session_after_it(
    api: Api, sql: Any, monkeypatch: pytest.MonkeyPatch, change: str, status: int
) -> None:
    await register(api)
    verify, transaction, changed = Passwords.verify, sql.transaction(), asyncio.Event()

    async def changed_meanwhile(passwords: Passwords, stored: str | None, password: str) -> bool:
        monkeypatch.undo()
        good = await verify(passwords, stored, password)
        await transaction.start()
        await sql.execute(change)
        changed.set()
        return good

    monkeypatch.setattr(Passwords, "verify", changed_meanwhile)
    login = asyncio.ensure_future(log_in(api))

    await changed.wait()
    await done_or_waiting(login, sql)
    await transaction.commit()
    assert (await login).status == status
    assert await sql.fetchval("SELECT count(*) FROM sessions") == 0


async def test_logins_at_once_bring_the_hash_up_and_all_are_good(
    settings: Settings, backing: Backing, sql: Any
) -> None:
    async with serving(Spy(settings).service, settings) as api:
        await register(api)
    async with serving(Spy(settings).service, msgspec.structs.replace(settings, argon2_time=2)) as api:
        answers = await asyncio.gather(*(log_in(api) for _ in range(5)))
    assert [answer.status for answer in answers] == [201] * 5
    assert ",t=2," in await sql.fetchval("SELECT password_hash FROM accounts")


@pytest.mark.parametrize("redis", [True, False], ids=["redis", "alone"])
async def test_who_guesses_waits_and_the_owner_does_not(settings: Settings, backing: Backing, redis: bool) -> None:
    changes = {"login_free_attempts": 3} | ({} if redis else {"redis_url": None})
    name = f"throttled-{redis}".lower()
    async with serving(Spy(settings).service, msgspec.structs.replace(settings, **changes)) as api:

        async def attempt(who: str, password: str, address: str) -> Any:
            body = {"email": f"{who}@{name}.example", "password": password}
            return await api.post("/api/v1/sessions", body, x_forwarded_for=address)

        await api.post("/api/v1/users", {"email": f"ann@{name}.example", "password": PASSWORD, "display_name": "Ann"})
        assert (await attempt("ann", PASSWORD, "10.0.0.1")).status == 201
        outcomes = {}
        for who in ("ann", "nobody"):
            found = [await attempt(who, "wrong password", f"10.1.0.{n}") for n in range(6)]
            outcomes[who] = [(answer.status, answer.body) for answer in found]
            assert [answer.status for answer in found] == [401, 401, 401, 401, 429, 429]
            assert int(found[-1].headers["Retry-After"]) >= 1
        assert outcomes["ann"] == outcomes["nobody"]
        assert (await attempt("ann", PASSWORD, "10.1.0.9")).status == 429  # a stranger, even with the password
        assert (await attempt("ann", PASSWORD, "10.0.0.1")).status == 201  # where she is logged in
        at_once = await asyncio.gather(*(attempt("bob", "wrong password", "10.2.0.1") for _ in range(20)))
        assert sum(answer.status == 401 for answer in at_once) == 4


async def test_an_address_that_tries_many_accounts_waits(settings: Settings, backing: Backing) -> None:
    changed = msgspec.structs.replace(settings, login_free_attempts_by_address=3)
    async with serving(Spy(settings).service, changed) as api:
        found = []
        for n in range(6):
            body = {"email": f"spray{n}@example.org", "password": "wrong password"}
            found.append((await api.post("/api/v1/sessions", body, x_forwarded_for=f"2001:db8:7:7::{n}")).status)
        assert found == [401, 401, 401, 401, 429, 429]


async def test_security_events_are_the_owner_s_to_read(api: Api) -> None:
    ann, bob = await token(api, "ann"), await token(api, "bob")
    await log_in(api, "ann", "wrong password")

    async def noted() -> Any:
        found = (await api.get("/api/v1/users/me/security-events", token=ann)).body
        return found if found["items"][0]["what"] == "login_failed" else None

    found = await eventually(noted)
    assert [item["what"] for item in found["items"]] == ["login_failed", "logged_in", "registered"]
    assert found["items"][0]["address"] == "127.0.0.1"
    first = (await api.get("/api/v1/users/me/security-events?limit=1", token=ann)).body
    second = (await api.get(f"/api/v1/users/me/security-events?limit=1&cursor={first['next_cursor']}", token=ann)).body
    assert (first["items"], second["items"]) == (found["items"][:1], found["items"][1:2])
    assert len((await api.get("/api/v1/users/me/security-events", token=bob)).body["items"]) == 2
    assert (await api.get("/api/v1/users/me/security-events")).status == 401
