"""The SQL of accounts, a function a question. `get_...` answers `None` for what is not there."""

from collections.abc import Mapping, Sequence, Set
from uuid import UUID

import msgspec

from services.users.errors import AddressTaken
from services.users.models import Account, Profile
from shared.database import Connection, Record
from shared.errors import TenfoldError
from shared.loader import fetch_by_key

CONSTRAINTS: Mapping[str, type[TenfoldError]] = {"accounts_email_key": AddressTaken}

_ACCOUNT = "id, email, email_verified, display_name, bio, locale, role, created_at, updated_at, version, disabled"


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


async def get_account(connection: Connection, account_id: UUID) -> Account | None:
    row = await connection.fetchrow(f"SELECT {_ACCOUNT} FROM accounts WHERE id = $1", account_id)
    return _account(row) if row else None


async def get_accounts(connection: Connection, ids: Sequence[UUID]) -> Mapping[UUID, Account]:
    rows = await fetch_by_key(connection, f"SELECT {_ACCOUNT} FROM accounts WHERE id", "uuid", ids)
    return {row["id"]: _account(row) for row in rows}


async def get_account_for_update(connection: Connection, account_id: UUID) -> Account | None:
    row = await connection.fetchrow(f"SELECT {_ACCOUNT} FROM accounts WHERE id = $1 FOR UPDATE", account_id)
    return _account(row) if row else None


async def lock_administrators_with(connection: Connection, account_id: UUID) -> Set[UUID]:
    """The active administrators, if the account is an administrator's; none of them goes until the transaction ends."""
    rows = await connection.fetch(
        "SELECT id FROM accounts WHERE role = 'admin' AND NOT disabled"
        " AND EXISTS (SELECT FROM accounts WHERE id = $1 AND role = 'admin') ORDER BY id FOR UPDATE",
        account_id,
    )
    return {row["id"] for row in rows}


async def get_profiles(connection: Connection, ids: Sequence[UUID]) -> Mapping[UUID, Profile]:
    rows = await fetch_by_key(
        connection, "SELECT id, display_name, bio, created_at, version FROM accounts WHERE id", "uuid", ids
    )
    return {row["id"]: Profile(**row) for row in rows}


class Credentials(msgspec.Struct, frozen=True):
    """`familiar`: somebody is logged in to the account from that address."""

    account_id: UUID
    role: str
    disabled: bool
    password_hash: str
    familiar: bool


async def get_credentials(connection: Connection, email: str, address: str) -> Credentials | None:
    """Little, and a row for who is unknown too: the time it takes is not to tell whether there is such an account."""
    row = await connection.fetchrow(
        "SELECT id, role, disabled, password_hash, EXISTS (SELECT FROM sessions s WHERE s.account_id = accounts.id"
        "  AND s.address = $2 AND s.expires_at > now()) AS familiar"
        " FROM (VALUES (1)) AS one LEFT JOIN accounts ON email = $1",
        email,
        address,
    )
    if row is None or row["id"] is None:
        return None
    return Credentials(row["id"], row["role"], row["disabled"], row["password_hash"], row["familiar"])


async def get_password_hash(connection: Connection, account_id: UUID) -> str | None:
    found: str | None = await connection.fetchval("SELECT password_hash FROM accounts WHERE id = $1", account_id)
    return found


async def get_account_by_email_for_update(connection: Connection, email: str) -> Account | None:
    return (await get_accounts_by_email_for_update(connection, [email])).get(email)


async def get_accounts_by_email_for_update(connection: Connection, emails: Sequence[str]) -> Mapping[str, Account]:
    """Locked in the order of their ids, as everybody who locks several does."""
    rows = await connection.fetch(
        f"SELECT {_ACCOUNT} FROM accounts WHERE email = ANY($1) ORDER BY id FOR UPDATE", emails
    )
    return {row["email"]: _account(row) for row in rows}


async def search_accounts(connection: Connection, query: str, before: UUID, limit: int) -> Sequence[Account]:
    """Newest first; those whose address or name holds `query`, or whose id it is."""
    rows = await connection.fetch(
        f"SELECT {_ACCOUNT} FROM accounts WHERE id < $2 AND (position(lower($1) IN email) > 0"
        " OR position(lower($1) IN lower(display_name)) > 0 OR id::text = lower($1)) ORDER BY id DESC LIMIT $3",
        query,
        before,
        limit,
    )
    return [_account(row) for row in rows]


async def update_account(connection: Connection, account: Account) -> Account:
    """Write what can change; the version and the time are counted on here."""
    row = await connection.fetchrow(
        "UPDATE accounts SET display_name = $2, bio = $3, locale = $4, email_verified = $5, role = $6, disabled = $7,"
        f" version = version + 1, updated_at = now() WHERE id = $1 RETURNING {_ACCOUNT}",
        account.id,
        account.display_name,
        account.bio,
        account.locale,
        account.email_verified,
        account.role.value,
        account.disabled,
    )
    assert row is not None
    return _account(row)


async def lock_credentials(connection: Connection, account_id: UUID, password_hash: str) -> bool:
    """Whether this is the password still and the account may be used; nobody changes that until the transaction ends.

    As strong a lock as a new hash takes: two logins that both bring it up to date must not wait for each other.
    """
    return (
        await connection.fetchval(
            "SELECT true FROM accounts WHERE id = $1 AND password_hash = $2 AND NOT disabled FOR NO KEY UPDATE",
            account_id,
            password_hash,
        )
        is not None
    )


async def set_password_hash(connection: Connection, account_id: UUID, password_hash: str) -> None:
    await connection.execute("UPDATE accounts SET password_hash = $2 WHERE id = $1", account_id, password_hash)


async def delete_account(connection: Connection, account: Account) -> None:
    """The row and all that hangs on it, and what anybody asked for in its name before it had an id to ask with."""
    await connection.execute("DELETE FROM accounts WHERE id = $1", account.id)
    await connection.execute("DELETE FROM password_reset_requests WHERE email = $1", account.email)
    # Registering stored its result for the Idempotency-Key in the account's own transaction: they share their time.
    await connection.execute(
        "DELETE FROM idempotency_keys WHERE created_at = $1 AND position($2::bytea IN result) > 0",
        account.created_at,
        str(account.id).encode(),
    )


def _account(row: Record) -> Account:
    return msgspec.convert({name: row[name] for name in Account.__struct_fields__}, Account)
