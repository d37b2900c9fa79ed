"""A small service for the library's tests: one table, one event, in a schema made for the test."""

from collections.abc import Mapping
from typing import ClassVar
from uuid import UUID

from shared.database import Connection, Database
from shared.errors import Conflict, TenfoldError
from shared.events import Event


class NameTaken(Conflict):
    type = "name-taken"


CONSTRAINTS: Mapping[str, type[TenfoldError]] = {"things_name_key": NameTaken}


def event_type(topic: str) -> type["ThingMade"]:
    """The event on a topic of its own, since a broker's topics outlive a test."""
    return type("ThingMade", (ThingMade,), {"TOPIC": topic, "__annotations__": {}}, frozen=True, kw_only=True)


class ThingMade(Event, frozen=True, kw_only=True):
    TYPE: ClassVar = "thing.made.v1"
    TOPIC: ClassVar = "things.events"
    KEY: ClassVar = "thing_id"

    thing_id: UUID
    number: int


async def create_table(db: Database) -> None:
    async with db.transaction() as tx:
        await tx.execute(
            "CREATE TABLE things (id uuid PRIMARY KEY, name text CONSTRAINT things_name_key UNIQUE,"
            " number int NOT NULL DEFAULT 0)"
        )
        await tx.execute("CREATE TABLE effects (consumer text, thing_id uuid, number int, at bigserial)")


async def insert(connection: Connection, thing_id: UUID, name: str) -> None:
    await connection.execute("INSERT INTO things (id, name) VALUES ($1, $2)", thing_id, name)


async def exists(connection: Connection, thing_id: UUID) -> bool:
    return bool(await connection.fetchval("SELECT EXISTS (SELECT FROM things WHERE id = $1)", thing_id))


async def where(connection: Connection) -> str:
    """The name of the server that answers."""
    return "replica" if await connection.fetchval("SELECT pg_is_in_recovery()") else "primary"


async def effects(connection: Connection, consumer: str) -> list[tuple[UUID, int]]:
    rows = await connection.fetch("SELECT thing_id, number FROM effects WHERE consumer = $1 ORDER BY at", consumer)
    return [(row["thing_id"], row["number"]) for row in rows]


async def outbox_size(connection: Connection) -> int:
    return int(await connection.fetchval("SELECT count(*) FROM outbox"))
