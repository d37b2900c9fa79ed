"""Deleting what has grown old in batches, a transaction each: no statement is long, and no lock is held for long."""

from shared.database import Database

BATCH = 1000


async def sweep(db: Database, table: str, column: str, age: str = "0", *, batch: int = BATCH) -> int:
    """Delete the rows of `table` whose `column` lies `age` back or further; returns how many.

    Any number may sweep at once: they take different rows. An index on the column makes it cheap.
    """
    statement = (
        f"DELETE FROM {table} WHERE ctid = ANY (ARRAY(SELECT ctid FROM {table}"  # noqa: S608 - names of our own
        f" WHERE {column} < now() - interval '{age}' ORDER BY {column} LIMIT $1 FOR UPDATE SKIP LOCKED))"
    )
    swept = 0
    while True:
        async with db.transaction() as tx:
            deleted = int((await tx.execute(statement, batch)).removeprefix("DELETE "))
        swept += deleted
        if deleted < batch:
            return swept
