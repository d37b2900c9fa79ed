"""A user who is gone stays gone, and links reach their owner only."""

import asyncio
from datetime import UTC, datetime

import pytest

from services.notifier import campaign_repository
from services.notifier.consumed import (
    SealedLink,
    UserDeleted,
    UserPasswordChanged,
    UserPasswordResetRequested,
    UserUpdated,
)
from services.notifier.models import Audience, NewCampaign
from shared import forgetting
from shared.database import Connection, Database
from shared.events import Envelope
from shared.ids import new_id
from shared.sealing import link_cipher
from shared.testing import eventually
from tests.integration.notifier.conftest import Make, Person, Sink


async def rows(db: Database, person: Person) -> int:
    """How many rows of any table hold the user's id."""

    async def count(connection: Connection) -> int:
        tables = await connection.fetch(
            "SELECT table_name FROM information_schema.tables WHERE table_schema = current_schema"
            " AND table_type = 'BASE TABLE'"
        )
        found = 0
        for (table,) in tables:
            found += await connection.fetchval(
                f'SELECT count(*) FROM "{table}" t WHERE position($1 IN row_to_json(t)::text) > 0', str(person.id)
            )
        return found

    async with db.transaction() as tx:
        return await count(tx)


@pytest.mark.parametrize("remembers", [True, False], ids=["as it is", "broken: forgets that it has forgotten"])
async def test_what_comes_late_brings_nobody_back(
    make: Make, db: Database, person: Person, monkeypatch: pytest.MonkeyPatch, remembers: bool
) -> None:
    node = await make()
    await node.give(person.registered(), person.processed())
    assert await rows(db, person) > 3
    deleted = await node.give(UserDeleted(user_id=person.id))
    assert await rows(db, person) == 0
    if not remembers:

        async def never(_tx: object, _user_id: object) -> bool:
            return False

        monkeypatch.setattr(forgetting, "is_forgotten", never)
    late = [
        person.processed(),
        person.failed(),
        UserUpdated(user_id=person.id, email=person.address, display_name="Ada", locale="en", version=9),
        UserPasswordChanged(user_id=person.id),
        UserPasswordResetRequested(user_id=person.id, link=SealedLink("x", 1)),
    ]
    await node.give(*late)
    await node.give_again(deleted)
    assert (await rows(db, person) == 0) is remembers


async def test_campaigns_and_bounces_keep_nothing_of_who_is_gone(make: Make, db: Database, person: Person) -> None:
    node = await make()
    other = Person()
    await node.give(person.registered(), other.registered())
    audience = Audience(user_ids=(person.id, other.id))
    new = NewCampaign("n", "s", "t", None, audience, send_at=datetime(2100, 1, 1, tzinfo=UTC))
    async with db.transaction() as tx:
        campaign = await campaign_repository.insert_campaign(tx, new_id(), new, person.id)
        await tx.execute("INSERT INTO suppressions (address, reason) VALUES ($1, 'no such user')", person.address)
    await node.give(UserDeleted(user_id=person.id))
    assert await rows(db, person) == 0
    async with db.transaction() as tx:
        assert await tx.fetchval("SELECT count(*) FROM suppressions") == 0
        kept = await campaign_repository.get_campaign(tx, campaign.id)
    assert kept is not None
    assert kept.audience.user_ids == (other.id,)


async def test_forgetting_and_storing_lock_each_other_out(make: Make, db: Database, person: Person) -> None:
    await make()
    stored = asyncio.Event()

    async def store() -> None:
        async with db.transaction() as tx:
            assert not await forgetting.is_forgotten(tx, person.id)
            stored.set()
            await tx.execute("SELECT pg_sleep(0.3)")
            await tx.execute("INSERT INTO recipients (user_id) VALUES ($1)", person.id)

    storing = asyncio.create_task(store())
    await stored.wait()
    async with db.transaction() as tx:
        await forgetting.forget(tx, person.id)
        await tx.execute("DELETE FROM recipients WHERE user_id = $1", person.id)
    await storing
    assert await rows(db, person) == 0


async def test_a_link_is_opened_in_the_email_only(make: Make, db: Database, person: Person, sink: Sink) -> None:
    node = await make()
    await node.give(person.registered())
    await sink.one_to(person.address)
    sealed = link_cipher(node.settings.link_secret).encrypt(b"the-token").decode()
    event = UserPasswordResetRequested(user_id=person.id, link=SealedLink(sealed, 1))
    envelopes: list[Envelope] = await node.give(event)
    await node.give_again(envelopes)

    async def mailed() -> str:
        mails = await sink.to(person.address)
        return next((mail["text"] for mail in mails if "#reset=the-token" in mail["text"]), "")

    assert "1 hour," in await eventually(mailed)
    _, inbox = await node.call("GET", "", person.id)
    assert [item["category"] for item in inbox["items"]] == ["welcome"]
    async with db.transaction() as tx:
        assert not await tx.fetchval("SELECT count(*) FROM emails e WHERE row_to_json(e)::text LIKE '%the-token%'")
    assert len(await sink.to(person.address)) == 2
