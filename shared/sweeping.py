"""Deleting what has grown old in batches, a transaction each: no statement is long, and no lock is held for long."""

from shared.database import Database

BATCH = 1000


async def sweep(
    db: Database, table: str, column: str, age: str = "0", *, batch: int = BATCH, by_range: bool = False
) -> int:
    """Delete the rows of `table` whose `column` lies `age` back or further; returns how many.

    Any number may sweep at once: they take different rows. An index on the column makes it cheap. `by_range`: it is a
    BRIN index, which has no order, and lists pages again that were swept, so `batch` should be large.
    """
    order = "" if by_range else f"ORDER BY {column}"
    statement = (
        f"DELETE FROM {table} WHERE ctid = ANY (ARRAY(SELECT ctid FROM {table}"  # noqa: S608 - names of our own
        f" WHERE {column} < now() - interval '{age}' {order} LIMIT $1 FOR UPDATE SKIP LOCKED))"
    )
    swept = 0
    while True:
        async with db.transaction() as tx:
            if by_range:  # the planner may think that most rows are old, just after they went
                await tx.execute("SET LOCAL enable_seqscan = off")
            deleted = int((await tx.execute(statement, batch)).removeprefix("DELETE "))
        swept += deleted
        if deleted < batch:
            return swept
