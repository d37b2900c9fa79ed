"""Deleting accounts, administrators, signing keys, and the commands of operators."""

import asyncio
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jwt
import msgspec
import pytest

from services.users.app import SERVICE
from services.users.events import UserDeleted
from services.users.settings import Settings
from shared.testing import eventually
from tests.backing import Backing
from tests.integration.users.people import ANN, PASSWORD, Spy, done_or_waiting, log_in, register, token
from tests.serving import Api, serving

ROOT = Path(__file__).parents[3]
NOBODY = "00000000-0000-7000-8000-000000000000"


async def administrator(api: Api, sql: Any, name: str = "root") -> str:
    await register(api, name)
    await sql.execute("UPDATE accounts SET role = 'admin' WHERE email = $1", f"{name}@example.org")
    access: str = (await log_in(api, name)).body["access_token"]
    return access


async def command(settings: Settings, *arguments: str, stdin: str = "") -> "subprocess.CompletedProcess[str]":
    """`python -m services.users ...` as an operator runs it."""
    env = os.environ | {
        "DATABASE_URL": settings.database_url,
        "DATABASE_PGBOUNCER": str(settings.database_pgbouncer).lower(),
        "USERS_SIGNING_KEY_SECRET": settings.signing_key_secret,
        "LINK_SECRET": settings.link_secret,
        "BUS": "inline",
        "ARGON2_MEMORY_KIB": "8192",
    }
    line = [sys.executable, "-m", "services.users", *arguments]
    return await asyncio.to_thread(
        subprocess.run, line, input=stdin, capture_output=True, text=True, env=env, cwd=ROOT, timeout=60, check=False
    )


async def test_a_deleted_account_is_gone_at_once(api: Api, spy: Spy, sql: Any) -> None:
    made = (await api.post("/api/v1/users", ANN, idempotency_key="mine")).body
    session = (await log_in(api)).body
    access = session["access_token"]
    await api.get(f"/api/v1/users/{made['id']}")  # into the cache
    assert (await api.call("DELETE", "/api/v1/users/me")).status == 401
    assert (await api.call("DELETE", "/api/v1/users/me", token=access, if_match='"v7"')).status == 412
    assert (await api.call("DELETE", "/api/v1/users/me", token=access, if_match='"v1"')).status == 202
    assert str((await spy.next(UserDeleted)).key()) == made["id"]
    for path in ("/api/v1/users/me", "/api/v1/users/me"):
        assert (await api.get(path, token=access)).status == 401
    assert (await api.call("PATCH", "/api/v1/users/me", {"bio": "x"}, token=access)).status == 401
    assert (await api.call("DELETE", "/api/v1/users/me", token=access)).status == 401
    assert (await api.get(f"/api/v1/users/{made['id']}")).status == 404
    refreshed = await api.post("/api/v1/sessions/refresh", {"refresh_token": session["refresh_token"]})
    assert (refreshed.status, (await log_in(api)).status) == (401, 401)
    assert await sql.fetchval("SELECT count(*) FROM idempotency_keys") == 0
    assert await sql.fetchval("SELECT count(*) FROM security_events") == 0
    assert (await register(api)).status == 201  # the address is free again


async def test_administrators_find_accounts(api: Api, sql: Any) -> None:
    admin = await administrator(api, sql)
    ann = (await register(api, "ann")).body
    for query in ("ANN@", ann["id"].upper(), "ann@example.org"):
        found = (await api.get(f"/api/v1/admin/users?query={query}", token=admin)).body
        assert [item["id"] for item in found["items"]] == [ann["id"]]
        assert found["items"][0]["disabled"] is False
    assert len((await api.get("/api/v1/admin/users", token=admin)).body["items"]) == 2
    assert (await api.get("/api/v1/admin/users?query=%25", token=admin)).body["items"] == []
    page = (await api.get("/api/v1/admin/users?limit=1", token=admin)).body
    assert page["next_cursor"]
    assert (await api.get("/api/v1/admin/users?limit=0", token=admin)).status == 422


async def test_only_administrators_may(api: Api, sql: Any) -> None:
    admin = await administrator(api, sql)
    ann = await token(api, "ann")
    for method, path, body in (
        ("GET", "/api/v1/admin/users", None),
        ("PATCH", f"/api/v1/admin/users/{NOBODY}", {"role": "admin"}),
    ):
        assert (await api.call(method, path, body)).status == 401
        assert (await api.call(method, path, body, token=ann)).status == 403
    await sql.execute("UPDATE accounts SET role = 'user' WHERE email = 'root@example.org'")
    assert (await api.get("/api/v1/admin/users", token=admin)).status == 403  # whatever the token says


async def test_administrators_change_roles_and_disable(api: Api, sql: Any) -> None:
    admin = await administrator(api, sql)
    ann = (await register(api, "ann")).body
    session = (await log_in(api, "ann")).body
    path = f"/api/v1/admin/users/{ann['id']}"
    assert (await api.call("PATCH", path, {"role": "king"}, token=admin)).status == 422
    assert (await api.call("PATCH", path, {"role": "admin"}, token=admin, if_match='"v9"')).status == 412
    assert (await api.call("PATCH", f"/api/v1/admin/users/{NOBODY}", {"role": "admin"}, token=admin)).status == 404
    promoted = await api.call("PATCH", path, {"role": "admin"}, token=admin, if_match='"v1"')
    assert (promoted.status, promoted.body["role"], promoted.headers["ETag"]) == (200, "admin", '"v2"')
    disabled = await api.call("PATCH", path, {"role": "user", "disabled": True}, token=admin)
    assert (disabled.body["disabled"], disabled.body["role"]) == (True, "user")
    refreshed = await api.post("/api/v1/sessions/refresh", {"refresh_token": session["refresh_token"]})
    assert refreshed.status == 401
    assert (await api.get("/api/v1/users/me", token=session["access_token"])).status == 401
    assert (await log_in(api, "ann")).status == 403
    assert (await log_in(api, "ann", "wrong password")).status == 401  # only who knows the password is told
    assert (await api.call("PATCH", path, {"disabled": False}, token=admin)).status == 200
    access = (await log_in(api, "ann")).body["access_token"]
    noted = [e["what"] for e in (await api.get("/api/v1/users/me/security-events", token=access)).body["items"]]
    assert {"role_changed", "disabled", "enabled"} <= set(noted)


async def test_no_administrator_locks_themselves_out(api: Api, sql: Any) -> None:
    admin = await administrator(api, sql)
    own = (await api.get("/api/v1/users/me", token=admin)).body["id"]
    for body in ({"role": "user"}, {"disabled": True}):
        answer = await api.call("PATCH", f"/api/v1/admin/users/{own}", body, token=admin)
        assert (answer.status, answer.body["type"]) == (409, "urn:tenfold:error:own-account")


async def test_the_last_administrator_stays(api: Api, sql: Any) -> None:
    admin = await administrator(api, sql)
    last = await api.call("DELETE", "/api/v1/users/me", token=admin)
    assert (last.status, last.body["type"]) == (409, "urn:tenfold:error:last-administrator")
    await administrator(api, sql, "other")
    await sql.execute("UPDATE accounts SET disabled = true WHERE email = 'other@example.org'")
    assert (await api.call("DELETE", "/api/v1/users/me", token=admin)).status == 409
    await sql.execute("UPDATE accounts SET disabled = false WHERE email = 'other@example.org'")
    assert (await api.call("DELETE", "/api/v1/users/me", token=admin)).status == 202


@pytest.mark.parametrize(("method", "status"), [("PATCH", 403), ("DELETE", 409)])
async def test_of_two_administrators_at_once_one_stays(api: Api, sql: Any, method: str, status: int) -> None:
    """While root demotes ann, she demotes root, or root leaves."""
    root, ann = await administrator(api, sql), await administrator(api, sql, "ann")
    own = (await api.get("/api/v1/users/me", token=root)).body["id"]
    async with sql.transaction():
        await sql.execute("UPDATE accounts SET role = 'user' WHERE email = 'ann@example.org'")
        if method == "PATCH":
            call = api.call("PATCH", f"/api/v1/admin/users/{own}", {"role": "user"}, token=ann)
        else:
            call = api.call("DELETE", "/api/v1/users/me", token=root)
        request = asyncio.ensure_future(call)
        await done_or_waiting(request, sql)
    assert (await request).status == status
    assert await sql.fetchval("SELECT count(*) FROM accounts WHERE role = 'admin'") == 1


async def test_the_first_administrator_is_made_on_the_command_line(api: Api, settings: Settings, sql: Any) -> None:
    made = await command(settings, "create-admin", "Root@example.org", stdin=PASSWORD + "\n")
    assert (made.returncode, made.stderr) == (0, "")
    access = (await log_in(api, "root")).body["access_token"]
    assert (await api.get("/api/v1/admin/users", token=access)).status == 200
    await register(api, "ann")
    await sql.execute("UPDATE accounts SET email_verified = true WHERE email = 'ann@example.org'")
    promoted = await command(settings, "create-admin", "ann@example.org")
    assert (promoted.returncode, "promoted" in promoted.stdout) == (0, True)
    assert (await api.get("/api/v1/users/me", token=(await log_in(api)).body["access_token"])).body["role"] == "admin"
    for arguments, stdin, status in (
        (["create-admin", "bob@example.org"], "password1\n", 1),
        (["create-admin", "bob@example.org"], "", 1),
        (["create-admin", "bob"], PASSWORD, 1),
        (["create-admin"], "", 78),
        (["destroy"], "", 78),
    ):
        refused = await command(settings, *arguments, stdin=stdin)
        assert (refused.returncode, refused.stderr.count("\n")) == (status, 1), refused.stderr


async def test_who_registers_the_address_of_an_administrator_to_be_does_not_become_one(
    api: Api, settings: Settings
) -> None:
    await register(api)
    stranger = (await log_in(api)).body["refresh_token"]
    assert (await command(settings, "create-admin", "ann@example.org")).returncode == 1  # for want of a password
    own = "another horse battery"
    promoted = await command(settings, "create-admin", "ann@example.org", stdin=own + "\n")
    assert (promoted.returncode, "promoted" in promoted.stdout) == (0, True)
    assert (await api.post("/api/v1/sessions/refresh", {"refresh_token": stranger})).status == 401
    assert (await log_in(api)).status == 401
    access = (await log_in(api, password=own)).body["access_token"]
    assert (await api.get("/api/v1/admin/users", token=access)).status == 200
    again = await command(settings, "create-admin", "ann@example.org")  # what is so already needs no password
    assert (again.returncode, (await log_in(api, password=own)).status) == (0, 201)


async def kids(api: Api) -> list[str]:
    return [key["kid"] for key in (await api.get("/.well-known/jwks.json")).body["keys"]]


def kid(access: str) -> str:
    found: str = jwt.get_unverified_header(access)["kid"]
    return found


async def test_keys_rotate_on_schedule_and_no_good_token_is_refused(settings: Settings, backing: Backing) -> None:
    """Two instances, a new key every few seconds; tokens of each are good at the other all the time."""
    quick = msgspec.structs.replace(
        settings, signing_key_rotation_seconds=3, signing_key_lead_seconds=2.0, access_token_seconds=3
    )
    async with serving(SERVICE, quick) as one, serving(SERVICE, quick) as two:
        await register(one)
        used, checked = set(), 0

        async def used_three() -> bool:
            nonlocal checked
            for signer, other in ((one, two), (two, one)):
                access = (await log_in(signer)).body["access_token"]
                used.add(kid(access))
                assert (await other.get("/api/v1/users/me", token=access)).status == 200
                checked += 1
            return len(used) >= 3

        await eventually(used_three, within=60, every=0.2)

        async def first_is_gone() -> bool:
            return len(set(await kids(one)) & used) < len(used)

        await eventually(first_is_gone, within=30)
        print(f"{checked} tokens of {len(used)} keys by two instances: none refused")


async def test_a_new_key_is_published_before_it_signs(api: Api, settings: Settings) -> None:
    access = await token(api)
    rotated = await command(settings, "rotate-keys")
    assert (rotated.returncode, rotated.stderr) == (0, "")
    new = rotated.stdout.split()[0]

    async def published() -> bool:
        return await kids(api) == [new, kid(access)]

    await eventually(published)
    assert kid((await log_in(api)).body["access_token"]) == kid(access)  # the lead time has not passed
    again = await command(settings, "rotate-keys")
    assert again.stdout.split()[0] == new  # one in waiting is enough


@pytest.mark.parametrize("path", ["/api/v1/users/me/password", "/api/v1/users/me/security-events"])
async def test_only_with_a_token(api: Api, path: str) -> None:
    method = "PUT" if path.endswith("password") else "GET"
    assert (await api.call(method, path, {} if method == "PUT" else None)).status == 401
