"""The connection budget: `pools x pool + surge <= max_connections - reserve`, in one place.

    python -m shared.budget --replicas 8 --pool 10      (make plan REPLICAS=8 POOL=10)

prints the arithmetic and the advice. A service asks the same at its start and refuses what cannot fit, because the
alternative is to be told so by the server on the busiest day. How the numbers are chosen: docs/connections.md.
"""

import argparse
import sys
from dataclasses import dataclass

# Past as many busy connections a core of the database server, throughput no longer grew (docs/connections.md).
_USEFUL_A_CORE = 8
_FEWEST = 2


class DoesNotFit(Exception):
    """The configuration needs more connections than the server has; the message holds the arithmetic."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """`pools`: how many pools there are at most, one a process and service. `surge`: how many more while a rollout runs
    old and new side by side. `reserve`: what people, monitoring, migrations and replication need."""

    pools: int
    pool: int
    max_connections: int
    reserve: int = 10
    surge: int = 0

    @property
    def needed(self) -> int:
        return (self.pools + self.surge) * self.pool

    @property
    def available(self) -> int:
        return self.max_connections - self.reserve

    @property
    def fits(self) -> bool:
        return self.needed <= self.available

    @property
    def largest_pool(self) -> int:
        """The largest pool with which as many pools fit; 0 when not even one connection each does."""
        return max(0, self.available // (self.pools + self.surge))

    def arithmetic(self) -> str:
        return (
            f"({self.pools} pools + {self.surge} surge) x {self.pool} = {self.needed} "
            f"{'<=' if self.fits else '>'} max_connections {self.max_connections} - reserve {self.reserve} "
            f"= {self.available}"
        )

    def require(self) -> None:
        """Raise `DoesNotFit` unless it fits."""
        if not self.fits:
            raise DoesNotFit(
                f"the connection budget does not fit: {self.arithmetic()}; lower DATABASE_POOL_MAX to "
                f"{self.largest_pool} or DATABASE_POOLS, or put PgBouncer between"
            )

    def advice(self, cores: int) -> list[str]:
        """What to do about it, for a database server with `cores` cores; a sentence a line."""
        useful = _USEFUL_A_CORE * cores
        lines = []
        if self.fits:
            lines.append(f"It fits, with {self.available - self.needed} to spare: connect directly.")
        elif self.largest_pool >= _FEWEST:
            lines.append(f"It does not fit. Set DATABASE_POOL_MAX={self.largest_pool} and connect directly.")
        else:
            lines.append(
                f"It does not fit, and {self.largest_pool} connection(s) a pool are too few. Put PgBouncer in "
                f"transaction mode between (DATABASE_PGBOUNCER=true), with default_pool_size={useful}."
            )
        if self.pools * min(self.pool, self.largest_pool) > useful:
            lines.append(
                f"About {useful} busy connections use all that {cores} core(s) have; what is past it waits in the "
                "server instead of in the pool, and gains nothing."
            )
        return lines


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m shared.budget", description="Do the pools fit the server?")
    parser.add_argument("--replicas", type=int, required=True, help="processes, of all services together, at most")
    parser.add_argument("--pool", type=int, default=10, help="DATABASE_POOL_MAX (default: 10)")
    parser.add_argument("--surge", type=int, default=1, help="processes a rollout adds (default: 1)")
    parser.add_argument("--max-connections", type=int, default=100, help="the server's (default: 100)")
    parser.add_argument("--reserve", type=int, default=10, help="kept for others (default: 10)")
    parser.add_argument("--cores", type=int, default=2, help="of the database server (default: 2)")
    given = parser.parse_args()
    if given.replicas < 1 or given.pool < 1:
        parser.error("--replicas and --pool must be at least 1")
    plan = Plan(
        pools=given.replicas,
        pool=given.pool,
        surge=given.surge,
        max_connections=given.max_connections,
        reserve=given.reserve,
    )
    print(plan.arithmetic(), *plan.advice(given.cores), sep="\n")  # noqa: T201
    return 0 if plan.fits else 1


if __name__ == "__main__":
    sys.exit(main())
