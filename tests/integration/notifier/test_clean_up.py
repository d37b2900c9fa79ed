"""What is old and done with goes, in batches; what is neither stays."""

import pytest

from services.notifier.clean_up import clean_up
from services.notifier.settings import Settings
from shared.database import Database
from shared.ids import new_id
from tests.integration.notifier.conftest import Person

OLD, YOUNG = "40 days", "1 day"


async def test_old_emails_and_deliveries_go(
    settings: Settings, db: Database, person: Person, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.notifier.clean_up._BATCH", 2)
    webhook = new_id()
    async with db.transaction() as tx:
        await tx.execute("INSERT INTO recipients (user_id) VALUES ($1)", person.id)
        await tx.execute(
            "INSERT INTO webhooks (id, user_id, url, events, secret) VALUES ($1, $2, 'https://a.example', '{}', 's')",
            webhook,
            person.id,
        )
        for age, email, delivery in [
            *[(OLD, "sent", "delivered")] * 5, (OLD, "queued", "queued"), (OLD, "sending", "claimed"),
            (YOUNG, "failed", "failed"),
        ]:  # fmt: skip
            await tx.execute(
                "INSERT INTO emails (id, event_id, user_id, category, context, message_id, state, created_at)"
                " VALUES ($1, $1, $2, 'welcome', '{}', '<1@a>', $3, now() - $4::text::interval)",
                new_id(), person.id, email, age,
            )  # fmt: skip
            await tx.execute(
                "INSERT INTO webhook_deliveries (id, webhook_id, event_id, type, payload, state, created_at)"
                " VALUES ($1, $2, $1, 'media.failed', '{}', $3, now() - $4::text::interval)",
                new_id(), webhook, delivery, age,
            )  # fmt: skip
    await clean_up(db, settings)
    async with db.transaction() as tx:
        emails = await tx.fetch("SELECT state FROM emails ORDER BY state")
        deliveries = await tx.fetch("SELECT state FROM webhook_deliveries ORDER BY state")
    assert [row["state"] for row in emails] == ["failed", "queued", "sending"]
    assert [row["state"] for row in deliveries] == ["claimed", "failed", "queued"]
