"""How many connections? Throughput of point reads and small writes by pool size, directly and through PgBouncer.

    python -m bench.connections [--rounds 5] [--seconds 1.0]

Every combination runs once a round, in turn, and its figure is the median of the rounds, so that what else the machine
does hits all of them alike. Compare the ratios; the absolute numbers are this machine's. 64 tasks a process ask without
a pause, through `Database` as a service does. A write is BEGIN, an INSERT of a row and COMMIT, made durable (fsync on).
"""

import argparse
import asyncio
import multiprocessing
import random
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import asyncpg
import uvloop

from devstack.stack import Stack
from devstack.topology import Topology
from shared import logs, migrate
from shared.database import Connection, Database
from shared.health import Health
from shared.settings import DataSettings

_TASKS = 64
_ROWS = 10_000
READ = "SELECT name FROM bench_rows WHERE id = $1"
WRITE = "INSERT INTO bench_writes (name) VALUES ($1)"


@dataclass(frozen=True)
class Case:
    """`pool` connections in each of `processes` processes; `through` is `direct` or `pgbouncer`."""

    what: str
    through: str
    processes: int
    pool: int


async def _load(url: str, case: Case, seconds: float) -> int:
    """Operations done in `seconds` by one process."""
    settings = DataSettings(
        database_url=url,
        database_pool_max=case.pool,
        database_pgbouncer=case.through == "pgbouncer",
        database_acquire_seconds=30,
        bus="inline",
    )
    done = 0
    async with Database.opened("bench", settings, Health()) as db:
        await asyncio.gather(*(_once(db, case) for _ in range(case.pool)))  # connections are open afterwards
        until = time.monotonic() + seconds

        async def client() -> None:
            nonlocal done
            while time.monotonic() < until:
                await _once(db, case)
                done += 1

        await asyncio.gather(*(client() for _ in range(_TASKS)))
    return done


async def _once(db: Database, case: Case) -> None:
    if case.what == "read":
        await db.read(_read, random.randrange(_ROWS))
    else:
        async with db.transaction() as tx:
            await tx.execute(WRITE, "row")


async def _read(connection: Connection, number: int) -> object:
    return await connection.fetchval(READ, number)


def _process(url: str, case: Case, seconds: float) -> int:
    return uvloop.run(_load(url, case, seconds))


async def measure(urls: dict[str, str], cases: list[Case], rounds: int, seconds: float) -> dict[Case, float]:
    """Operations a second of each case: the median of the rounds."""
    found: dict[Case, list[float]] = {case: [] for case in cases}
    with multiprocessing.get_context("spawn").Pool(
        max(case.processes for case in cases), initializer=logs.setup, initargs=("bench", "error")
    ) as workers:
        for _ in range(rounds):
            for case in cases:
                work = [(urls[case.through], case, seconds)] * case.processes
                counts = await asyncio.to_thread(workers.starmap, _process, work, 1)
                found[case].append(sum(counts) / seconds)
    return {case: statistics.median(rates) for case, rates in found.items()}


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0)
    given = parser.parse_args()
    cases = [
        Case(what, through, processes, pool)
        for what in ("read", "write")
        for through in ("direct", "pgbouncer")
        for processes, pools in ((1, (1, 2, 4, 8, 16, 32)), (4, (1, 2, 4, 8)))
        for pool in pools
    ]
    with tempfile.TemporaryDirectory() as root:
        topology = Topology.backing(replicas=0, redis=0, broker="none", pgbouncer=True)
        async with Stack(topology, root=Path(root), keep_data=False) as stack:
            await migrate.bootstrap(stack.urls.postgres_primary, {"bench": "bench"})
            place = stack.urls.postgres_primary.rsplit("@", 1)[1]
            urls = {"direct": f"postgresql://bench:bench@{place}", "pgbouncer": stack.pooled_urls("bench", "bench")[0]}
            connection = await asyncpg.connect(urls["direct"])
            await connection.execute(
                "CREATE TABLE bench_rows (id int PRIMARY KEY, name text);"
                "CREATE TABLE bench_writes (id bigserial PRIMARY KEY, name text);"
                f"INSERT INTO bench_rows SELECT n, 'row ' || n FROM generate_series(0, {_ROWS - 1}) n;"
            )
            await connection.close()
            rates = await measure(urls, cases, given.rounds, given.seconds)
    for what in ("read", "write"):
        base = rates[Case(what, "direct", 1, 1)]
        print(f"\n{what}s a second, as a multiple of one process with one direct connection ({base:,.0f}/s)")
        print(f"{'':12}{'processes':>10}  " + "".join(f"{f'pool {pool}':>9}" for pool in (1, 2, 4, 8, 16, 32)))
        for through in ("direct", "pgbouncer"):
            for processes in (1, 4):
                row = [rates.get(Case(what, through, processes, pool)) for pool in (1, 2, 4, 8, 16, 32)]
                cells = "".join(f"{'' if rate is None else f'{rate / base:.2f}':>9}" for rate in row)
                print(f"{through:12}{processes:>10}  {cells}")


if __name__ == "__main__":
    asyncio.run(main())
