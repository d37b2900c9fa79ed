import asyncio

from shared.database import Database
from shared.health import Health
from shared.settings import DataSettings
from shared.sweeping import sweep

OLD = 250


async def test_sweeps_all_that_is_old_in_batches_and_nothing_else(data_settings: DataSettings, health: Health) -> None:
    async with Database.opened("users", data_settings, health) as db:
        async with db.transaction() as tx:
            await tx.execute(
                "INSERT INTO forgotten (digest, forgotten_at) SELECT decode(md5(n::text), 'hex'),"
                f" now() + interval '30 minutes' - interval '1 hour' * n FROM generate_series(1, {OLD} + 24) n"
            )
        swept = await asyncio.gather(*(sweep(db, "forgotten", "forgotten_at", "24 hours", batch=20) for _ in range(4)))
        assert sum(swept) == OLD
        assert await left(db) == 24
        assert await sweep(db, "forgotten", "forgotten_at", batch=10) == 24


async def left(db: Database) -> int:
    async with db.transaction() as tx:
        number: int = await tx.fetchval("SELECT count(*) FROM forgotten")
    return number
