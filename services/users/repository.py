"""All the SQL of users, a function a question. `get_...` answers `None` for what is not there."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any
from uuid import UUID

import msgspec

from services.users.errors import AddressTaken
from services.users.models import Account, Client, Profile, Session
from shared.database import Connection, Record
from shared.errors import TenfoldError

CONSTRAINTS: Mapping[str, type[TenfoldError]] = {"accounts_email_key": AddressTaken}

_ACCOUNT = "id, email, email_verified, display_name, bio, locale, role, created_at, updated_at, version"
_SESSION = "id, account_id, device, address, created_at, last_seen_at"


async def insert_account(
    connection: Connection, account_id: UUID, email: str, password_hash: str, display_name: str
) -> Account:
    row = await connection.fetchrow(
        f"INSERT INTO accounts (id, email, password_hash, display_name) VALUES ($1, $2, $3, $4) RETURNING {_ACCOUNT}",
        account_id,
        email,
        password_hash,
        display_name,
    )
    assert row is not None
    return _account(row)


async def get_accounts(connection: Connection, ids: Sequence[UUID]) -> Mapping[UUID, Account]:
    rows = await connection.fetch(f"SELECT {_ACCOUNT} FROM accounts WHERE id = ANY ($1::uuid[])", ids)
    return {row["id"]: _account(row) for row in rows}


async def get_account_for_update(connection: Connection, account_id: UUID) -> Account | None:
    row = await connection.fetchrow(f"SELECT {_ACCOUNT} FROM accounts WHERE id = $1 FOR UPDATE", account_id)
    return _account(row) if row else None


async def get_profiles(connection: Connection, ids: Sequence[UUID]) -> Mapping[UUID, Profile]:
    rows = await connection.fetch(
        "SELECT id, display_name, bio, created_at, version FROM accounts WHERE id = ANY ($1::uuid[])", ids
    )
    return {row["id"]: Profile(**row) for row in rows}


async def get_credentials(connection: Connection, email: str) -> tuple[Account, str] | None:
    """The account of an address and the hash of its password."""
    row = await connection.fetchrow(f"SELECT {_ACCOUNT}, password_hash FROM accounts WHERE email = $1", email)
    return (_account(row), row["password_hash"]) if row else None


async def update_account(connection: Connection, account: Account) -> Account:
    """Write what an owner may change; the version and the time are counted on here."""
    row = await connection.fetchrow(
        "UPDATE accounts SET display_name = $2, bio = $3, locale = $4, version = version + 1, updated_at = now()"
        f" WHERE id = $1 RETURNING {_ACCOUNT}",
        account.id,
        account.display_name,
        account.bio,
        account.locale,
    )
    assert row is not None
    return _account(row)


async def update_password_hash(connection: Connection, account_id: UUID, old: str, new: str) -> None:
    await connection.execute(
        "UPDATE accounts SET password_hash = $3 WHERE id = $1 AND password_hash = $2", account_id, old, new
    )


async def insert_session(
    connection: Connection, session_id: UUID, account_id: UUID, client: Client, expires_at: datetime
) -> None:
    await connection.execute(
        "INSERT INTO sessions (id, account_id, device, address, expires_at) VALUES ($1, $2, $3, $4, $5)",
        session_id,
        account_id,
        client.device,
        client.address,
        expires_at,
    )


async def insert_refresh_token(connection: Connection, digest: bytes, session_id: UUID) -> None:
    await connection.execute("INSERT INTO refresh_tokens (digest, session_id) VALUES ($1, $2)", digest, session_id)


class FoundToken(msgspec.Struct, frozen=True):
    session: Session
    role: str
    spent_seconds_ago: float | None


async def get_refresh_token_for_update(connection: Connection, digest: bytes) -> FoundToken | None:
    """A token of a session that has not expired, locked together with that session."""
    row = await connection.fetchrow(
        "SELECT s.id, s.account_id, s.device, s.address, s.created_at, s.last_seen_at, a.role,"
        " extract(epoch FROM clock_timestamp() - t.spent_at)::float8 AS spent_seconds_ago"
        "  FROM refresh_tokens t JOIN sessions s ON s.id = t.session_id JOIN accounts a ON a.id = s.account_id"
        " WHERE t.digest = $1 AND s.expires_at > now() FOR UPDATE OF s, t",
        digest,
    )
    return FoundToken(_session(row), row["role"], row["spent_seconds_ago"]) if row else None


async def spend_refresh_token(connection: Connection, digest: bytes) -> None:
    await connection.execute(
        "UPDATE refresh_tokens SET spent_at = clock_timestamp() WHERE digest = $1 AND spent_at IS NULL", digest
    )


async def touch_session(connection: Connection, session_id: UUID, expires_at: datetime) -> None:
    await connection.execute(
        "UPDATE sessions SET last_seen_at = now(), expires_at = $2 WHERE id = $1", session_id, expires_at
    )


async def list_sessions(connection: Connection, account_id: UUID, before: UUID, limit: int) -> Sequence[Session]:
    rows = await connection.fetch(
        f"SELECT {_SESSION} FROM sessions WHERE account_id = $1 AND expires_at > now() AND id < $2"
        " ORDER BY id DESC LIMIT $3",
        account_id,
        before,
        limit,
    )
    return [_session(row) for row in rows]


async def delete_session(connection: Connection, account_id: UUID, session_id: UUID) -> bool:
    status = await connection.execute("DELETE FROM sessions WHERE account_id = $1 AND id = $2", account_id, session_id)
    return status != "DELETE 0"


async def delete_sessions(connection: Connection, account_id: UUID) -> None:
    await connection.execute("DELETE FROM sessions WHERE account_id = $1", account_id)


class StoredKey(msgspec.Struct, frozen=True):
    id: str
    public_key: bytes
    private_key: bytes
    created_at: datetime


async def list_signing_keys(connection: Connection) -> Sequence[StoredKey]:
    """Newest first."""
    rows = await connection.fetch(
        "SELECT id, public_key, private_key, created_at FROM signing_keys ORDER BY created_at DESC"
    )
    return [StoredKey(**row) for row in rows]


async def insert_first_signing_key(connection: Connection, key_id: str, public: bytes, private: bytes) -> None:
    """Insert the key unless there is one, however many processes try at once."""
    await connection.execute("LOCK TABLE signing_keys IN SHARE ROW EXCLUSIVE MODE")
    await connection.execute(
        "INSERT INTO signing_keys (id, public_key, private_key)"
        " SELECT $1, $2, $3 WHERE NOT EXISTS (SELECT FROM signing_keys)",
        key_id,
        public,
        private,
    )


def _account(row: Record) -> Account:
    return msgspec.convert(_fields(row, Account), Account)


def _session(row: Record) -> Session:
    return Session(**_fields(row, Session))


def _fields(row: Record, struct: type[msgspec.Struct]) -> dict[str, Any]:
    return {name: row[name] for name in struct.__struct_fields__}
