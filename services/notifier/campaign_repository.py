"""The SQL of campaigns and of who must not be written to, a function a question."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from uuid import UUID

import msgspec

from services.notifier.models import Audience, Campaign
from shared.database import Connection, Record

_CAMPAIGN = "id, name, subject, text, html, audience, send_at, state, prepared, created_at"
_NOBODY = UUID(int=0)


async def insert_campaign(
    connection: Connection, campaign: Campaign, created_by: UUID, send_at: datetime | None
) -> Campaign:
    row = await connection.fetchrow(
        "INSERT INTO campaigns (id, name, subject, text, html, audience, send_at, created_by)"
        " VALUES ($1, $2, $3, $4, $5, $6::text::jsonb, coalesce($7, now()), $8)"
        f" RETURNING {_CAMPAIGN}",
        campaign.id,
        campaign.name,
        campaign.subject,
        campaign.text,
        campaign.html,
        msgspec.json.encode(campaign.audience).decode(),
        send_at,
        created_by,
    )
    assert row is not None
    return _campaign(row)


async def get_campaign(connection: Connection, campaign_id: UUID) -> Campaign | None:
    row = await connection.fetchrow(f"SELECT {_CAMPAIGN} FROM campaigns WHERE id = $1", campaign_id)
    return _campaign(row) if row else None


async def get_campaign_for_update(connection: Connection, campaign_id: UUID) -> Campaign | None:
    row = await connection.fetchrow(f"SELECT {_CAMPAIGN} FROM campaigns WHERE id = $1 FOR UPDATE", campaign_id)
    return _campaign(row) if row else None


async def list_campaigns(connection: Connection, before: UUID, limit: int) -> Sequence[Campaign]:
    rows = await connection.fetch(
        f"SELECT {_CAMPAIGN} FROM campaigns WHERE id < $1 ORDER BY id DESC LIMIT $2", before, limit
    )
    return [_campaign(row) for row in rows]


async def count_emails(connection: Connection, campaign_ids: Sequence[UUID]) -> Mapping[UUID, Mapping[str, int]]:
    """How many emails of each campaign are in each state."""
    rows = await connection.fetch(
        "SELECT campaign_id, state, count(*) AS number FROM emails WHERE campaign_id = ANY ($1::uuid[])"
        " GROUP BY campaign_id, state",
        list(campaign_ids),
    )
    counts: dict[UUID, dict[str, int]] = {}
    for row in rows:
        counts.setdefault(row["campaign_id"], {})[row["state"]] = row["number"]
    return counts


async def set_state(connection: Connection, campaign_id: UUID, state: str) -> None:
    await connection.execute("UPDATE campaigns SET state = $2 WHERE id = $1", campaign_id, state)


async def set_prepared(connection: Connection, campaign_id: UUID) -> None:
    await connection.execute("UPDATE campaigns SET prepared = true WHERE id = $1", campaign_id)


async def list_audience(connection: Connection, campaign: Campaign, after: UUID | None, limit: int) -> Sequence[UUID]:
    """The next recipients in the order of their ids. Ids are UUIDv7, so those below the campaign's own are the users
    who were there when it was made: a snapshot without a copy."""
    rows = await connection.fetch(
        "SELECT user_id FROM recipients WHERE user_id > $1 AND user_id < $2 AND email IS NOT NULL"
        " AND ($3::text IS NULL OR locale = $3) AND ($4::uuid[] IS NULL OR user_id = ANY ($4))"
        " ORDER BY user_id LIMIT $5",
        after or _NOBODY,
        campaign.id,
        campaign.audience.locale,
        None if campaign.audience.user_ids is None else list(campaign.audience.user_ids),
        limit,
    )
    return [row["user_id"] for row in rows]


async def queue_emails(
    connection: Connection, campaign_id: UUID, category: str, rows: Sequence[tuple[UUID, UUID, str]]
) -> None:
    """`rows`: email id, recipient, message id. A recipient who has an email of this campaign gets no other."""
    await connection.executemany(
        "INSERT INTO emails (id, event_id, user_id, category, context, message_id, campaign_id)"
        " VALUES ($1, $1, $2, $3, '{}', $4, $5) ON CONFLICT DO NOTHING",
        [(email_id, user_id, category, message_id, campaign_id) for email_id, user_id, message_id in rows],
    )


async def suppress_address(connection: Connection, address: str, reason: str) -> None:
    await connection.execute(
        "INSERT INTO suppressions (address, reason) VALUES ($1, $2) ON CONFLICT DO NOTHING", address, reason
    )


async def get_user_of_token(connection: Connection, token: UUID) -> UUID | None:
    """Whose unsubscribe links carry this token."""
    found: UUID | None = await connection.fetchval("SELECT user_id FROM recipients WHERE unsubscribe_token = $1", token)
    return found


def _campaign(row: Record) -> Campaign:
    return Campaign(**{**row, "audience": msgspec.json.decode(row["audience"], type=Audience)})
