"""The SQL of one-time tokens and of requests for a new password."""

from collections.abc import Sequence
from uuid import UUID

import msgspec

from services.users.models import Client, Purpose
from shared.database import Connection


async def insert_one_time_token(
    connection: Connection, digest: bytes, account_id: UUID, purpose: Purpose, at_most: int
) -> bool:
    """False when the account has `at_most` that are good already. The caller holds the account's lock."""
    status = await connection.execute(
        "INSERT INTO one_time_tokens (digest, account_id, purpose, expires_at)"
        " SELECT $1, $2, $3::text, now() + make_interval(hours => $4) WHERE (SELECT count(*) FROM one_time_tokens"
        "  WHERE account_id = $2 AND purpose = $3::text AND expires_at > now()) < $5",
        digest,
        account_id,
        purpose.value,
        purpose.valid_hours,
        at_most,
    )
    return status != "INSERT 0 0"


async def get_owner_of_token(connection: Connection, digest: bytes, purpose: Purpose) -> UUID | None:
    owner: UUID | None = await connection.fetchval(
        "SELECT account_id FROM one_time_tokens WHERE digest = $1 AND purpose = $2 AND expires_at > now()",
        digest,
        purpose.value,
    )
    return owner


async def spend_token(connection: Connection, digest: bytes, purpose: Purpose) -> bool:
    """Delete a good token; of two at once, one gets it. The caller holds the account's lock."""
    status = await connection.execute(
        "DELETE FROM one_time_tokens WHERE digest = $1 AND purpose = $2 AND expires_at > now()", digest, purpose.value
    )
    return status != "DELETE 0"


async def delete_tokens(connection: Connection, account_id: UUID, purpose: Purpose) -> None:
    await connection.execute(
        "DELETE FROM one_time_tokens WHERE account_id = $1 AND purpose = $2", account_id, purpose.value
    )


class ResetRequest(msgspec.Struct, frozen=True):
    email: str
    client: Client


async def insert_reset_request(connection: Connection, request_id: UUID, request: ResetRequest) -> None:
    await connection.execute(
        "INSERT INTO password_reset_requests (id, email, device, address) VALUES ($1, $2, $3, $4)",
        request_id,
        request.email,
        request.client.device,
        request.client.address,
    )


async def take_reset_requests(connection: Connection, limit: int) -> Sequence[ResetRequest]:
    """Delete some and answer them, oldest first; no two takers get the same one."""
    rows = await connection.fetch(
        "DELETE FROM password_reset_requests WHERE id IN"
        " (SELECT id FROM password_reset_requests ORDER BY id LIMIT $1 FOR UPDATE SKIP LOCKED)"
        " RETURNING email, device, address",
        limit,
    )
    return [ResetRequest(row["email"], Client(row["device"], row["address"])) for row in rows]
