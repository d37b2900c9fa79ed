"""The SQL of webhooks and of their deliveries, a function a question."""

from collections.abc import Sequence
from uuid import UUID

from services.notifier.models import Delivery, DeliveryInHand, Webhook
from shared.database import Connection, Record

_WEBHOOK = "id, user_id, url, events, secret, disabled_at, created_at"
_OF_A_WEBHOOK, _OF_AN_OWNER = 2, 4  # in hand at a time
# Of a delivery `d`; `$3` is the lease. What is in hand is not, and comes before what is where they are counted.
_DUE = (
    "((d.state = 'queued' AND d.next_attempt_at <= now())"
    " OR (d.state = 'claimed' AND d.claimed_at < now() - make_interval(secs => $3)))"
)
_DELIVERY = "id, webhook_id, event_id, type, state, attempts, next_attempt_at, last_status, last_error, created_at"


async def count_webhooks(connection: Connection, user_id: UUID) -> int:
    return int(await connection.fetchval("SELECT count(*) FROM webhooks WHERE user_id = $1", user_id))


async def insert_webhook(
    connection: Connection, webhook_id: UUID, user_id: UUID, url: str, events: Sequence[str], secret: str
) -> Webhook:
    row = await connection.fetchrow(
        f"INSERT INTO webhooks (id, user_id, url, events, secret) VALUES ($1, $2, $3, $4, $5) RETURNING {_WEBHOOK}",
        webhook_id,
        user_id,
        url,
        list(events),
        secret,
    )
    assert row is not None
    return _webhook(row)


async def list_webhooks(connection: Connection, user_id: UUID, before: UUID, limit: int) -> Sequence[Webhook]:
    rows = await connection.fetch(
        f"SELECT {_WEBHOOK} FROM webhooks WHERE user_id = $1 AND id < $2 ORDER BY id DESC LIMIT $3",
        user_id,
        before,
        limit,
    )
    return [_webhook(row) for row in rows]


async def get_webhook(connection: Connection, user_id: UUID, webhook_id: UUID) -> Webhook | None:
    row = await connection.fetchrow(
        f"SELECT {_WEBHOOK} FROM webhooks WHERE id = $1 AND user_id = $2", webhook_id, user_id
    )
    return _webhook(row) if row else None


async def delete_webhook(connection: Connection, user_id: UUID, webhook_id: UUID) -> bool:
    """With its deliveries; false when the user has no such webhook."""
    status = await connection.execute("DELETE FROM webhooks WHERE id = $1 AND user_id = $2", webhook_id, user_id)
    return status != "DELETE 0"


async def disable_webhook(connection: Connection, webhook_id: UUID) -> UUID | None:
    """Call it no more; its owner, unless it is disabled already. What is queued for it fails."""
    owner: UUID | None = await connection.fetchval(
        "UPDATE webhooks SET disabled_at = now() WHERE id = $1 AND disabled_at IS NULL RETURNING user_id", webhook_id
    )
    await connection.execute(
        "UPDATE webhook_deliveries SET state = 'failed', last_error = 'the webhook is disabled'"
        " WHERE webhook_id = $1 AND state = 'queued'",
        webhook_id,
    )
    return owner


async def list_deliveries(connection: Connection, webhook_id: UUID, before: UUID, limit: int) -> Sequence[Delivery]:
    rows = await connection.fetch(
        f"SELECT {_DELIVERY} FROM webhook_deliveries WHERE webhook_id = $1 AND id < $2 ORDER BY id DESC LIMIT $3",
        webhook_id,
        before,
        limit,
    )
    return [Delivery(**row) for row in rows]


async def list_subscribed(connection: Connection, user_id: UUID, event_type: str) -> Sequence[UUID]:
    """The user's webhooks that want events of this type."""
    rows = await connection.fetch(
        "SELECT id FROM webhooks WHERE user_id = $1 AND $2 = ANY (events) AND disabled_at IS NULL", user_id, event_type
    )
    return [row["id"] for row in rows]


async def insert_delivery(
    connection: Connection, delivery_id: UUID, webhook_id: UUID, event_id: UUID, event_type: str, payload: str
) -> None:
    await connection.execute(
        "INSERT INTO webhook_deliveries (id, webhook_id, event_id, type, payload) VALUES ($1, $2, $3, $4, $5)"
        " ON CONFLICT ON CONSTRAINT webhook_deliveries_event_key DO NOTHING",
        delivery_id,
        webhook_id,
        event_id,
        event_type,
        payload,
    )


async def requeue_delivery(connection: Connection, webhook_id: UUID, delivery_id: UUID) -> bool:
    """Deliver once more from the beginning; false when there is no such delivery, true also while it is under way."""
    status = await connection.execute(
        "UPDATE webhook_deliveries SET state = CASE WHEN state = 'claimed' THEN state ELSE 'queued' END,"
        " attempts = 0, next_attempt_at = now() WHERE id = $1 AND webhook_id = $2",
        delivery_id,
        webhook_id,
    )
    return status != "UPDATE 0"


async def claim_deliveries(
    connection: Connection, claim: UUID, limit: int, lease_seconds: float
) -> Sequence[DeliveryInHand]:
    """Take what is due, or was left by a dispatcher that died. Receivers know a repetition by its id.

    No webhook and no owner has more than their share in hand, so that who answers late or never delays nobody else.
    """
    rows = await connection.fetch(
        "WITH of_webhooks AS ("
        f"  SELECT d.id, w.url, w.secret, w.user_id, d.next_attempt_at, {_DUE} AS is_due,"
        f"   row_number() OVER (PARTITION BY w.id ORDER BY {_DUE}, d.next_attempt_at) AS number"
        "   FROM webhook_deliveries d JOIN webhooks w ON w.id = d.webhook_id"
        f"  WHERE w.disabled_at IS NULL AND (d.state = 'claimed' OR {_DUE})),"
        " of_owners AS (SELECT id, url, secret, next_attempt_at, is_due,"
        "   row_number() OVER (PARTITION BY user_id ORDER BY is_due, next_attempt_at) AS number"
        "   FROM of_webhooks WHERE number <= $4),"
        " due AS ("
        "  SELECT d.id, o.url, o.secret FROM webhook_deliveries d JOIN of_owners o USING (id)"
        # Once more, of the row as it is when it is locked: another dispatcher may have had it meanwhile.
        f"  WHERE o.is_due AND o.number <= $5 AND {_DUE}"
        "   ORDER BY o.next_attempt_at LIMIT $2 FOR UPDATE OF d SKIP LOCKED)"
        " UPDATE webhook_deliveries d SET state = 'claimed', claim = $1, claimed_at = clock_timestamp(),"
        "  attempts = d.attempts + 1 FROM due WHERE d.id = due.id"
        " RETURNING d.id, d.webhook_id, d.claim, d.event_id, d.payload, d.attempts, due.url, due.secret",
        claim,
        limit,
        lease_seconds,
        _OF_A_WEBHOOK,
        _OF_AN_OWNER,
    )
    return [DeliveryInHand(**row) for row in rows]


async def note_delivered(connection: Connection, delivery: DeliveryInHand, status: int) -> None:
    await connection.execute(
        "UPDATE webhook_deliveries SET state = 'delivered', delivered_at = now(), last_status = $3, last_error = NULL"
        " WHERE id = $1 AND claim = $2",
        delivery.id,
        delivery.claim,
        status,
    )
    await connection.execute(
        "UPDATE webhooks SET failing_since = NULL WHERE id = $1 AND failing_since IS NOT NULL", delivery.webhook_id
    )


async def note_failed(
    connection: Connection, delivery: DeliveryInHand, status: int | None, error: str, delay_seconds: float | None
) -> float:
    """To be tried again after the delay, or given up where it is `None` or the webhook is disabled meanwhile. Answers
    for how many seconds every delivery to this webhook has failed."""
    await connection.execute(
        "UPDATE webhook_deliveries SET state = CASE WHEN $5::float8 IS NULL"
        "   OR EXISTS (SELECT FROM webhooks w WHERE w.id = webhook_id AND disabled_at IS NOT NULL)"
        "   THEN 'failed' ELSE 'queued' END,"
        " next_attempt_at = now() + make_interval(secs => coalesce($5, 0)), last_status = $3, last_error = $4"
        " WHERE id = $1 AND claim = $2",
        delivery.id,
        delivery.claim,
        status,
        error,
        delay_seconds,
    )
    seconds = await connection.fetchval(
        "UPDATE webhooks SET failing_since = coalesce(failing_since, now()) WHERE id = $1"
        " RETURNING extract(epoch FROM now() - failing_since)::float8",
        delivery.webhook_id,
    )
    return float(seconds or 0)


async def delete_old_deliveries(connection: Connection, older_than_seconds: float, limit: int) -> int:
    """Those that are done with, the oldest first; returns how many there were."""
    status = await connection.execute(
        "DELETE FROM webhook_deliveries WHERE id IN (SELECT id FROM webhook_deliveries"
        " WHERE created_at < now() - make_interval(secs => $1) AND state IN ('delivered', 'failed')"
        " ORDER BY created_at LIMIT $2 FOR UPDATE SKIP LOCKED)",
        older_than_seconds,
        limit,
    )
    return int(status.split()[-1])


def _webhook(row: Record) -> Webhook:
    return Webhook(**{**row, "events": tuple(row["events"])})
