"""The SQL of campaigns and of who must not be written to, a function a question."""

from collections.abc import Mapping, Sequence
from uuid import UUID

import msgspec

from services.notifier.models import Audience, Campaign, NewCampaign, SendWindow
from shared.database import Connection, Record

_CAMPAIGN = (
    "id, name, subject, text, html, audience, window_from, window_until, time_zone, send_at, state, prepared,"
    " created_at, counts"
)
_NOBODY = UUID(int=0)


async def insert_campaign(connection: Connection, campaign_id: UUID, new: NewCampaign, created_by: UUID) -> Campaign:
    row = await connection.fetchrow(
        "INSERT INTO campaigns (id, name, subject, text, html, audience, window_from, window_until, time_zone,"
        " send_at, created_by)"
        " VALUES ($1, $2, $3, $4, $5, $6::text::jsonb, $7, $8, $9, coalesce($10, now()), $11)"
        f" RETURNING {_CAMPAIGN}",
        campaign_id,
        new.name,
        new.subject,
        new.text,
        new.html,
        msgspec.json.encode(new.audience).decode(),
        new.window and new.window.start,
        new.window and new.window.until,
        new.window and new.window.time_zone,
        new.send_at,
        created_by,
    )
    assert row is not None
    return _campaign(row)


async def is_time_zone(connection: Connection, name: str) -> bool:
    """Whether the database, which tells the time, knows it."""
    return bool(await connection.fetchval("SELECT EXISTS (SELECT FROM pg_timezone_names WHERE name = $1)", name))


async def pause_without_time_zone(connection: Connection) -> Sequence[UUID]:
    """Pause the campaigns whose time zone the database does not know (any more); which those are."""
    rows = await connection.fetch(
        "UPDATE campaigns SET state = 'paused' WHERE state = 'running' AND finished_at IS NULL"
        " AND time_zone NOT IN (SELECT name FROM pg_timezone_names) RETURNING id"
    )
    return [row["id"] for row in rows]


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


async def count_emails(connection: Connection, campaign_id: UUID) -> Mapping[str, int]:
    """How many emails of the campaign are in each state."""
    rows = await connection.fetch(
        "SELECT state, count(*) AS number FROM emails WHERE campaign_id = $1 GROUP BY state", campaign_id
    )
    return {row["state"]: row["number"] for row in rows}


async def set_state(connection: Connection, campaign_id: UUID, state: str) -> None:
    await connection.execute("UPDATE campaigns SET state = $2 WHERE id = $1", campaign_id, state)


async def set_prepared(connection: Connection, campaign_id: UUID) -> None:
    await connection.execute("UPDATE campaigns SET prepared = true WHERE id = $1", campaign_id)


async def list_audience(connection: Connection, campaign: Campaign, after: UUID | None, limit: int) -> Sequence[UUID]:
    """The next recipients in the order of their ids. Ids are UUIDv7, so those below the campaign's own are the users
    who were there when it was made: a snapshot without a copy."""
    rows = await connection.fetch(
        "SELECT user_id FROM recipients WHERE user_id > $1 AND user_id < $2 AND email IS NOT NULL"
        " AND ($3::text IS NULL OR locale = $3 OR starts_with(locale, $3 || '-'))"
        " AND ($4::uuid[] IS NULL OR user_id = ANY ($4))"
        " ORDER BY user_id LIMIT $5",
        after or _NOBODY,
        campaign.id,
        campaign.audience.locale,
        None if campaign.audience.user_ids is None else list(campaign.audience.user_ids),
        limit,
    )
    return [row["user_id"] for row in rows]


async def queue_emails(
    connection: Connection, campaign_id: UUID, category: str, emails: Sequence[tuple[UUID, UUID]], domain: str
) -> None:
    """`emails`: their ids and recipients. A recipient who has an email of this campaign gets no other, nor does one who
    was deleted after having been listed."""
    await connection.execute(
        "INSERT INTO emails (id, event_id, user_id, category, context, message_id, campaign_id)"
        " SELECT id, id, user_id, $3, '{}', '<' || id || '@' || $4 || '>', $5"
        " FROM unnest($1::uuid[], $2::uuid[]) AS made (id, user_id) JOIN recipients USING (user_id)"
        " FOR KEY SHARE OF recipients ON CONFLICT DO NOTHING",
        [email_id for email_id, _ in emails],
        [user_id for _, user_id in emails],
        category,
        domain,
        campaign_id,
    )


async def finish_campaigns(connection: Connection, limit: int) -> int:
    """Close the books of campaigns of which nothing is left to send; returns how many, at most `limit`."""
    status = await connection.execute(
        "WITH over AS (SELECT id FROM campaigns c WHERE finished_at IS NULL AND (prepared OR state = 'cancelled')"
        "   AND NOT EXISTS (SELECT FROM emails e WHERE e.campaign_id = c.id AND (e.state IN ('claimed', 'sending')"
        "     OR (e.state = 'queued' AND c.state <> 'cancelled'))) LIMIT $1 FOR UPDATE SKIP LOCKED)"
        " UPDATE campaigns c SET finished_at = now(), counts = (SELECT coalesce(jsonb_object_agg(state, number), '{}')"
        "   FROM (SELECT state, count(*) AS number FROM emails WHERE campaign_id = c.id GROUP BY state) AS counted)"
        "  FROM over WHERE c.id = over.id",
        limit,
    )
    return int(status.split()[-1])


async def forget_user(connection: Connection, user_id: UUID) -> None:
    """Nobody can tell from campaigns that there was such a user: neither as author nor as one of those named."""
    await connection.execute("UPDATE campaigns SET created_by = NULL WHERE created_by = $1", user_id)
    await connection.execute(
        "UPDATE campaigns SET audience = jsonb_set(audience, '{user_ids}', (audience -> 'user_ids') - $1)"
        " WHERE audience -> 'user_ids' ? $1",
        str(user_id),
    )


async def get_user_of_token(connection: Connection, token: UUID) -> UUID | None:
    """Whose unsubscribe links carry this token."""
    found: UUID | None = await connection.fetchval("SELECT user_id FROM recipients WHERE unsubscribe_token = $1", token)
    return found


def _campaign(row: Record) -> Campaign:
    found = dict(row)
    start, until, time_zone = (found.pop(name) for name in ("window_from", "window_until", "time_zone"))
    return Campaign(
        **found
        | {
            "audience": msgspec.json.decode(row["audience"], type=Audience),
            "window": SendWindow(start, until, time_zone) if start is not None else None,
            "counts": row["counts"] and msgspec.json.decode(row["counts"]),
        }
    )
