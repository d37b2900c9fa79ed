"""PostgreSQL: transactions on the primary, reads on a replica that has seen what the caller wrote.

`async with db.transaction() as tx:` goes to the primary. `await db.read(query, ...)` calls `query(connection, ...)` on
a replica that has itself replayed the caller's consistency token, else on the primary. Queries are plain functions of a
`Connection`, so the same one serves both.

Nothing waits without a bound: connecting, getting a connection from the pool, each statement, and closing. No session
state is relied on, so PgBouncer in transaction mode may stand between. A new primary among the hosts of `DATABASE_URL`
is found without a restart.

    database.py   what callers use: transactions, reads, and which server answers them
    primary.py    the one server that takes writes, found among several hosts
    replica.py    how far a replica has replayed, and whether it may answer
    server.py     one server: bounds, metrics, giving connections back
    pool.py       its connections
    session.py    one connection, each of whose statements ends in time
"""

from shared.database.database import Connection, Cursor, Database, Record, Transaction

__all__ = ["Connection", "Cursor", "Database", "Record", "Transaction"]
