"""A campaign to 1,000 through the gateway, and somebody who unsubscribes while it runs."""

import re
from typing import Any

import asyncpg
import pytest

from shared.ids import new_id
from shared.testing import eventually
from tests.e2e.conftest import Platform, administrator

pytestmark = pytest.mark.timeout(180)

CROWD = 999


async def crowd(platform: Platform) -> dict[str, str]:
    """Users of whom only notifier knows, at many providers: address by id."""
    people = {str(new_id()): f"{n}@{n % 50}.example" for n in range(CROWD)}
    connection = await asyncpg.connect(platform.stack.database_url("notifier"))
    try:
        await connection.copy_records_to_table("recipients", records=list(people.items()), columns=["user_id", "email"])
    finally:
        await connection.close()
    return people


def campaign_mails(mails: list[dict[str, Any]], subject: str) -> list[dict[str, Any]]:
    return [mail for mail in mails if mail["subject"] == subject]


@pytest.mark.parametrize("platform", [4], ids=["stage 4"], indirect=True)
async def test_a_campaign_to_a_thousand_with_an_unsubscription_in_between(platform: Platform) -> None:
    admin, people = await administrator(platform), await crowd(platform)
    bob = await platform.person()  # the last of the audience
    body = {"name": "spring", "subject": "Spring is here", "text": "Come and see."}

    async def launched(user_ids: list[str], **changes: str) -> str:
        made = await admin.post("/api/v1/campaigns", body | {"audience": {"user_ids": user_ids}} | changes)
        assert made.status == 202, made
        return f"/api/v1/campaigns/{made.body['id']}"

    async def has(path: str, **expected: object) -> Any:
        async def look() -> Any:
            now = (await admin.get(path)).body
            return now if expected.items() <= now.items() else None

        return await eventually(look, within=90)

    # A first one, to bob only, brings him the link.
    await has(await launched([bob.id], subject="Winter is here"), state="done", sent=1)
    (mail,) = campaign_mails(await platform.mails(bob.email), "Winter is here")
    found = re.search(r"(/api/v1/unsubscribe/[0-9a-f-]+)", mail["headers"]["List-Unsubscribe"])
    assert found is not None

    path = await launched([*people, bob.id])
    assert (await admin.post(f"{path}/pause")).body["state"] == "paused"
    await has(path, state="paused", total=CROWD + 1)
    one_click = {"List-Unsubscribe": "One-Click"}
    async with bob.http.post(bob.base + found[1], data=one_click) as response:  # as mail programs do: no login
        assert response.status == 200
    assert (await admin.post(f"{path}/resume")).status == 200
    done = await has(path, state="done")
    assert (done["sent"], done["suppressed"], done["failed"], done["ambiguous"]) == (CROWD, 1, 0, 0)
    async with platform.http.get(f"{platform.stack.urls.mail}/recipients") as response:
        arrived = await response.json()
    assert {arrived.get(address) for address in people.values()} == {1}
    assert campaign_mails(await platform.mails(bob.email), "Spring is here") == []
    assert (await bob.post("/api/v1/campaigns", body | {"audience": {"all": True}})).status == 403
