"""The SQL of emails on their way (the states stand in `models`), a function a question."""

from collections.abc import Mapping, Sequence
from typing import Any
from uuid import UUID

import msgspec

from services.notifier.models import Email, EmailState, Ended, Leaving
from shared.database import Connection, Record

# Of a campaign's email `e` to the recipient `r`.
_UNWANTED = (
    "e.campaign_id IS NOT NULL AND (EXISTS (SELECT FROM suppressions s WHERE s.address = r.email)"
    " OR EXISTS (SELECT FROM preferences p WHERE p.user_id = e.user_id AND e.category = ANY (p.refused_email)))"
)
_WHY_UNWANTED = "'not wanted, or the address refuses email'"


async def insert_email(
    connection: Connection,
    email_id: UUID,
    event_id: UUID,
    user_id: UUID,
    category: str,
    context: Mapping[str, Any],
    message_id: str,
) -> None:
    """Queue an email, unless this event has made one of this category."""
    await connection.execute(
        "INSERT INTO emails (id, event_id, user_id, category, context, message_id)"
        " VALUES ($1, $2, $3, $4, $5::text::jsonb, $6)"
        " ON CONFLICT ON CONSTRAINT emails_event_category_key DO NOTHING",
        email_id,
        event_id,
        user_id,
        category,
        msgspec.json.encode(context).decode(),
        message_id,
    )


async def claim_emails(connection: Connection, claim: UUID, limit: int) -> Sequence[Email]:
    """Take what is due, belongs to no campaign and has an address, longest due first. No two senders get the same one.
    What is not wanted is done with that; it is among the answer, marked so."""
    return _emails(await connection.fetch(_claiming(_DUE), claim, limit))


async def claim_campaign_emails(connection: Connection, claim: UUID, limit: int) -> Sequence[Email]:
    """As `claim_emails`, of campaigns. Raises `InvalidParameterValueError` where the database does not know the time
    zone of one of them."""
    return _emails(await connection.fetch(_claiming(_DUE_OF_CAMPAIGNS), claim, limit))


def _emails(rows: Sequence[Record]) -> Sequence[Email]:
    return [Email(**{**row, "context": msgspec.json.decode(row["context"])}) for row in rows]


_DUE = """
    SELECT e.id FROM emails e JOIN recipients r ON r.user_id = e.user_id
     WHERE e.state = 'queued' AND e.campaign_id IS NULL AND e.next_attempt_at <= now() AND r.email IS NOT NULL
     ORDER BY e.next_attempt_at LIMIT $2 FOR UPDATE OF e SKIP LOCKED"""
_DUE_OF_CAMPAIGNS = """
    SELECT e.id FROM campaigns c CROSS JOIN LATERAL (
           SELECT id FROM emails WHERE campaign_id = c.id AND state = 'queued' AND next_attempt_at <= now()
            ORDER BY next_attempt_at LIMIT $2 FOR UPDATE SKIP LOCKED) e
     WHERE c.finished_at IS NULL AND c.state = 'running' AND c.send_at <= now()
       AND (c.window_from IS NULL OR (SELECT CASE WHEN c.window_from < c.window_until
              THEN clock >= c.window_from AND clock < c.window_until
              ELSE clock >= c.window_from OR clock < c.window_until END
             FROM CAST(now() AT TIME ZONE c.time_zone AS time) AS clock)) LIMIT $2"""


def _claiming(due: str) -> str:
    return (
        f"WITH due AS ({due})"
        f" UPDATE emails e SET state = CASE WHEN {_UNWANTED} THEN 'suppressed' ELSE 'claimed' END,"
        f"  last_error = CASE WHEN {_UNWANTED} THEN {_WHY_UNWANTED} ELSE e.last_error END,"
        "  claim = $1, claimed_at = clock_timestamp(), attempts = e.attempts + 1"
        "   FROM due, recipients r WHERE e.id = due.id AND r.user_id = e.user_id"
        " RETURNING e.id, e.claim, e.user_id, e.category, e.context, e.message_id, e.attempts, e.campaign_id,"
        "  r.email AS address, r.display_name, r.locale, r.unsubscribe_token, e.state = 'suppressed' AS suppressed"
    )


async def note(connection: Connection, notes: Sequence[Leaving | Ended]) -> Sequence[EmailState | None]:
    """Note how far senders are with emails, in the order of the emails' ids; for each that is leaving, its state:

    `SENDING`: it may leave now. `QUEUED`: its campaign is paused or cancelled. `SUPPRESSED`: its recipient does not
    want the campaign, or the address refuses email. `None`: it is not the claimant's any more. May be noted again.
    """
    leaving = [one.email for one in notes if isinstance(one, Leaving)]
    states = await _begin(connection, leaving) if leaving else {}
    if ended := [one for one in notes if isinstance(one, Ended)]:
        await _end(connection, ended)
    return [states.get(one.email.id) if isinstance(one, Leaving) else None for one in notes]


async def _begin(connection: Connection, emails: Sequence[Email]) -> Mapping[UUID, EmailState]:
    rows = await connection.fetch(
        "WITH held AS ("
        "  SELECT e.id, CASE WHEN e.campaign_id IS NULL THEN 'sending'"
        "    WHEN NOT EXISTS (SELECT FROM campaigns c WHERE c.id = e.campaign_id AND c.state = 'running') THEN 'queued'"
        f"   WHEN {_UNWANTED} THEN 'suppressed' ELSE 'sending' END AS state"
        "   FROM unnest($1::uuid[], $2::uuid[]) AS asked (id, claim) JOIN emails e USING (id, claim)"
        "   JOIN recipients r USING (user_id) WHERE e.state IN ('claimed', 'sending') ORDER BY e.id FOR UPDATE OF e)"
        " UPDATE emails e SET state = held.state, claimed_at = clock_timestamp(),"
        "  attempts = e.attempts - (held.state = 'queued')::int,"
        f" last_error = CASE held.state WHEN 'suppressed' THEN {_WHY_UNWANTED} ELSE e.last_error END"
        "  FROM held WHERE e.id = held.id RETURNING e.id, e.state",
        [email.id for email in emails],
        [email.claim for email in emails],
    )
    return {row["id"]: EmailState(row["state"]) for row in rows}


async def _end(connection: Connection, ended: Sequence[Ended]) -> None:
    """Nothing where somebody else has the email by now. What bounced is an address to leave alone, if it is the
    recipient's still."""
    await connection.execute(
        "WITH ended AS (SELECT id, claim, state, delay, error, counted"
        "   FROM unnest($1::uuid[], $2::uuid[], $3::text[], $4::float8[], $5::text[], $6::int[])"
        "   AS ended (id, claim, state, delay, error, counted)),"
        " locked AS (SELECT e.id FROM emails e JOIN ended USING (id, claim)"
        "   WHERE e.state IN ('claimed', 'sending', 'ambiguous') ORDER BY e.id FOR UPDATE OF e)"
        " UPDATE emails e SET state = ended.state, next_attempt_at = now() + make_interval(secs => ended.delay),"
        "  attempts = e.attempts - 1 + ended.counted, last_error = ended.error,"
        "  sent_at = CASE ended.state WHEN 'sent' THEN now() END"
        "  FROM ended JOIN locked USING (id) WHERE e.id = ended.id",
        [one.email.id for one in ended],
        [one.email.claim for one in ended],
        [one.state for one in ended],
        [one.delay_seconds for one in ended],
        [one.error for one in ended],
        [int(one.counted) for one in ended],
    )
    if bounced := [one for one in ended if one.bounced]:
        await connection.execute(
            "INSERT INTO suppressions (address, reason) SELECT DISTINCT ON (r.email) r.email, b.reason"
            " FROM unnest($1::uuid[], $2::text[], $3::text[]) AS b (user_id, address, reason)"
            " JOIN recipients r ON r.user_id = b.user_id AND r.email = b.address"
            " ORDER BY r.email ON CONFLICT DO NOTHING",
            [one.email.user_id for one in bounced],
            [one.email.address for one in bounced],
            [one.error or "" for one in bounced],
        )


async def release_abandoned_emails(
    connection: Connection, lease_seconds: float, retry_ambiguous: bool, limit: int
) -> int:
    """Take back what senders had for longer than the lease: what cannot have left is queued again, the rest is
    ambiguous. Returns how many there were, at most `limit`."""
    status = await connection.execute(
        "WITH abandoned AS (SELECT id FROM emails WHERE state IN ('claimed', 'sending')"
        "   AND claimed_at < now() - make_interval(secs => $1) ORDER BY id LIMIT $3 FOR UPDATE SKIP LOCKED)"
        " UPDATE emails e SET state = CASE WHEN state = 'claimed' OR $2 THEN 'queued' ELSE 'ambiguous' END,"
        "  next_attempt_at = now(), last_error = 'the sender went away while ' || state"
        "  FROM abandoned WHERE e.id = abandoned.id",
        lease_seconds,
        retry_ambiguous,
        limit,
    )
    return int(status.split()[-1])


async def delete_old_emails(connection: Connection, older_than_seconds: float, limit: int) -> int:
    """Those of no campaign that are done with, the oldest first; returns how many there were."""
    status = await connection.execute(
        "DELETE FROM emails WHERE id IN (SELECT id FROM emails WHERE campaign_id IS NULL"
        " AND created_at < now() - make_interval(secs => $1) AND state NOT IN ('queued', 'claimed', 'sending')"
        " ORDER BY created_at LIMIT $2 FOR UPDATE SKIP LOCKED)",
        older_than_seconds,
        limit,
    )
    return int(status.split()[-1])
