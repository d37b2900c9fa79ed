"""`make bench-login`: does the time of a refused login or of a reset tell whether an address has an account?

`python -m bench.login_timing [N]`: N attempts each (2,000), in random order, at known and unknown addresses, through
the real service. Prints the area under the ROC curve of the time as a classifier: 0.5 is no better than a coin, and
0.55 is the limit (exit status 1 beyond).
"""

import asyncio
import random
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from devstack.stack import Stack
from devstack.topology import Topology
from services.users.app import SERVICE
from services.users.settings import Settings
from shared import logs
from tests.backing import Backing, Schema
from tests.serving import Api, serving

_PEOPLE = 20
_LIMIT = 0.55


def auc(first: Sequence[float], second: Sequence[float]) -> float:
    """The chance that one of `second` is larger than one of `first` (Mann-Whitney)."""
    ranked = sorted([(value, 0) for value in first] + [(value, 1) for value in second])
    ranks = sum(rank for rank, (_, which) in enumerate(ranked, 1) if which)
    return (ranks - len(second) * (len(second) + 1) / 2) / (len(first) * len(second))


async def measure(api: Api, path: str, attempts: int) -> tuple[float, float, float]:
    """AUC, and the medians in milliseconds, of known and unknown addresses at `path`."""
    order = [True, False] * attempts
    random.shuffle(order)
    times: dict[bool, list[float]] = {True: [], False: []}
    for n, known in enumerate(order):
        email = f"{'known' if known else 'nobody'}{n % _PEOPLE}@example.org"
        body = {"email": email, "password": "wrong password"} if path.endswith("sessions") else {"email": email}
        started = time.perf_counter()
        # Each from an address of its own: the delays for who guesses are not what is measured.
        await api.post(path, body, x_forwarded_for=f"10.{n >> 16}.{n >> 8 & 255}.{n & 255}")
        times[known].append(time.perf_counter() - started)
    middle = {known: sorted(found)[len(found) // 2] * 1000 for known, found in times.items()}
    return auc(times[False], times[True]), middle[True], middle[False]


@asynccontextmanager
async def database(root: Path) -> AsyncIterator[Schema]:
    """A database for users and nothing else, so that little else takes time."""
    topology = Topology.backing(replicas=0, redis=0, broker="none")
    async with Stack(topology, root=root, durable=False, keep_data=False) as stack:
        servers = Backing(stack.urls.postgres_primary, [], "", "", "", "", "", stack)
        async with servers.schema("users") as schema:
            yield schema


async def main(attempts: int) -> int:
    logs.setup("bench", "error")
    worst = 0.0
    with tempfile.TemporaryDirectory() as folder:
        async with database(Path(folder)) as schema:
            settings = Settings(
                database_url=schema.url,
                bus="inline",
                signing_key_secret="s" * 32,
                link_secret="l" * 32,
                login_free_attempts=10**6,
                # As little as is allowed: what hashing takes hides the rest, so this is the harder measurement.
                argon2_memory_kib=8192,
                argon2_time=1,
                drain_seconds=0,
                log_level="error",
            )
            async with serving(SERVICE, settings) as api:
                for n in range(_PEOPLE):
                    person = {"email": f"known{n}@example.org", "password": "correct horse", "display_name": "A"}
                    assert (await api.post("/api/v1/users", person)).status == 201
                for path in ("/api/v1/sessions", "/api/v1/password-resets"):
                    found, known, unknown = await measure(api, path, attempts)
                    worst = max(worst, abs(found - 0.5) + 0.5)
                    print(
                        f"{path}: {attempts} each, AUC {found:.3f} (limit {_LIMIT});"
                        f" medians {known:.2f} ms known, {unknown:.2f} ms unknown",
                        flush=True,
                    )
    return int(worst >= _LIMIT)


if __name__ == "__main__":
    sys.exit(asyncio.run(main(int(sys.argv[1]) if len(sys.argv) > 1 else 2000)))
