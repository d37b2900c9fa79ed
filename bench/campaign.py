"""`make bench-campaign`: one campaign to 100,000 recipients, against what the mail server takes from a bare loop.

Takes a few minutes. PostgreSQL, Redis, the broker and the mail sink are real; the workers are processes as in
production. The bare loop sends one finished message again and again over connections that it keeps. `RECIPIENTS=1000`
makes it short.
"""

import asyncio
import os
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import aiohttp
import aiosmtplib
import asyncpg
import psutil
import uvloop

from devstack.ports import free_port
from devstack.stack import Stack
from devstack.topology import Topology
from services.notifier.campaign_repository import count_emails
from services.notifier.campaigns import Campaigns
from services.notifier.channels.email import Composer
from services.notifier.models import Audience, Campaign, NewCampaign
from services.notifier.texts import Texts
from shared import migrate
from shared.bus import KafkaBus
from shared.clock import SystemClock
from shared.database import Database
from shared.health import Health
from shared.idempotency import Once
from shared.ids import new_id
from shared.outbox import Outbox, Relay
from shared.settings import DataSettings
from shared.testing import eventually

RESULTS = Path(__file__).parent / "results" / "campaign.md"
MIGRATIONS = Path(__file__).parent.parent / "services" / "notifier" / "migrations"
RECIPIENTS = int(os.environ.get("RECIPIENTS", "100000"))
WORKERS = int(os.environ.get("WORKERS", "1"))
BARE_SECONDS = 5.0
BARE_LOOPS = (1, 16)
SAMPLE_SECONDS = 1.0
NEW = NewCampaign("spring", "Spring is here", "Come and see.\n" * 20, None, Audience())


class Campaigning:
    """Servers, recipients, and workers of notifier as processes. Open it with `Campaigning.opened`."""

    def __init__(self, stack: Stack, db: Database, http: aiohttp.ClientSession) -> None:
        self.stack = stack
        self.db = db
        self.http = http
        settings = DataSettings(database_url=stack.database_url("notifier"), kafka_bootstrap=(stack.urls.kafka or "",))
        # It only adds: the workers' relays move what it has added.
        relay = Relay("notifier", db, KafkaBus(settings, Health()))
        self.campaigns = Campaigns(db, Outbox("notifier", relay), SystemClock())

    @classmethod
    @asynccontextmanager
    async def opened(cls, root: Path) -> "AsyncIterator[Campaigning]":
        async with AsyncExitStack() as exits:
            stack = Stack(Topology.backing(replicas=0), root=root, durable=True, keep_data=False)
            await exits.enter_async_context(stack)
            url = stack.database_url("notifier")
            await migrate.migrate(url, "notifier", MIGRATIONS)
            settings = DataSettings(database_url=url, kafka_bootstrap=(stack.urls.kafka or "",))
            db = await exits.enter_async_context(Database.opened("notifier", settings, Health()))
            http = await exits.enter_async_context(aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=60)))
            yield cls(stack, db, http)

    async def people(self, number: int) -> None:
        """So many recipients, `1@example.com` and so on, as if their events had come."""
        connection = await asyncpg.connect(self.stack.database_url("notifier"))
        try:
            await connection.copy_records_to_table(
                "recipients",
                records=((new_id(), f"{n}@example.com", f"Person {n}", 1) for n in range(number)),
                columns=["user_id", "email", "display_name", "source_version"],
            )
            await connection.execute("ANALYZE recipients")
        finally:
            await connection.close()

    @asynccontextmanager
    async def worker(self, **environment: str) -> AsyncIterator[asyncio.subprocess.Process]:
        """`python -m services.notifier worker`, ready; ended politely unless it is gone already."""
        process = await self.start_worker(**environment)
        try:
            yield process
        finally:
            if process.returncode is None:
                process.terminate()
                async with asyncio.timeout(40):
                    await process.wait()

    async def start_worker(self, **environment: str) -> asyncio.subprocess.Process:
        admin = free_port()
        env = os.environ | {
            "DATABASE_URL": self.stack.database_url("notifier"),
            "KAFKA_BOOTSTRAP": self.stack.urls.kafka or "",
            "KAFKA_IDEMPOTENCE": "true" if self.stack.broker_kind == "apache" else "false",
            "KAFKA_SESSION_TIMEOUT_SECONDS": "6",
            "REDIS_URL": self.stack.urls.redis or "",
            "SMTP_URL": self.stack.urls.smtp,
            "JWKS_URL": "http://127.0.0.1:1/unused-by-workers",
            "LINK_SECRET": "l" * 32,
            "EMAIL_DOMAIN_PER_SECOND": "100000",
            "ADMIN_PORT": str(admin),
            "DRAIN_SECONDS": "0",
            "LOG_LEVEL": "warning",
            **environment,
        }
        process = await asyncio.create_subprocess_exec(sys.executable, "-m", "services.notifier", "worker", env=env)

        async def ready() -> bool:
            try:
                async with self.http.get(f"http://127.0.0.1:{admin}/health/ready") as response:
                    return response.status == 200
            except aiohttp.ClientConnectionError:
                return False

        await eventually(ready, within=60)
        return process

    async def launch(self) -> Campaign:
        """A campaign to everybody, now."""
        progress = await self.campaigns.create(new_id(), NEW, Once("bench", None, b""))
        return progress.campaign

    async def counts(self, campaign: Campaign) -> dict[str, int]:
        async with self.db.transaction() as tx:
            return dict(await count_emails(tx, campaign.id))

    async def received(self) -> int:
        async with self.http.get(f"{self.stack.urls.mail}/stats") as response:
            return int((await response.json())["received"])


async def bare(world: Campaigning, loops: int) -> float:
    """Messages a second that the sink takes from so many loops, each with one connection."""
    texts = Texts("http://localhost:8080")
    url = texts.unsubscribe_url(new_id())
    content = texts.campaign(NEW.subject, NEW.text, NEW.html, "en", url)
    letter = Composer("Tenfold <no-reply@tenfold.example>", SystemClock()).compose(
        content, "Person", "bare@example.com", "<bare@tenfold.example>", url
    )
    host, _, port = world.stack.urls.smtp.removeprefix("smtp://").partition(":")
    sent = 0
    started = time.perf_counter()

    async def loop() -> None:
        nonlocal sent
        async with aiosmtplib.SMTP(hostname=host, port=int(port), start_tls=False, local_hostname="bench") as smtp:
            while time.perf_counter() - started < BARE_SECONDS:
                await smtp.mail(letter.sender)
                await smtp.rcpt(letter.recipient)
                await smtp.data(letter.content)
                sent += 1

    await asyncio.gather(*(loop() for _ in range(loops)))
    return sent / (time.perf_counter() - started)


async def measure(world: Campaigning) -> str:
    limits = {loops: [await bare(world, loops)] for loops in BARE_LOOPS}
    await world.people(RECIPIENTS)
    before = await world.received()
    async with AsyncExitStack() as exits:
        workers = [await exits.enter_async_context(world.worker()) for _ in range(WORKERS)]
        processes = [psutil.Process(worker.pid) for worker in workers]
        campaign = await world.launch()
        started = time.perf_counter()
        memory: list[tuple[int, float]] = []  # sent so far, MiB of the largest worker
        first = last = 0.0
        while (done := await world.received() - before) < RECIPIENTS:
            if done and not first:
                first = time.perf_counter()
            memory.append((done, max(process.memory_info().rss for process in processes) / 2**20))
            await asyncio.sleep(SAMPLE_SECONDS)
            if time.perf_counter() - started > 900:
                raise TimeoutError(f"{done} of {RECIPIENTS} sent")
        last = time.perf_counter()
        cpu = sum(sum(process.cpu_times()[:2]) for process in processes)

        async def noted() -> bool:
            return (await world.counts(campaign)).get("sent") == RECIPIENTS

        await eventually(noted, within=30)
    for loops in BARE_LOOPS:
        limits[loops].append(await bare(world, loops))
    rate = RECIPIENTS / (last - first)
    tenth = next(mib for done, mib in memory if done >= RECIPIENTS / 10)
    peak = max(mib for _, mib in memory)
    machine = f"{os.cpu_count()} cores shared with all servers and the sink, Python {sys.version.split()[0]}"
    lines = [
        f"# A campaign to {RECIPIENTS:,} recipients",
        "",
        f"{machine}, worker processes: {WORKERS}. `make bench-campaign` writes this file.",
        "",
        "| | emails/s | workers / bare |",
        "|---|---:|---:|",
        f"| the workers: claim, limit, compose, send, note | {rate:,.0f} | |",
    ]
    for loops, found in limits.items():
        limit = statistics.mean(found)
        lines.append(f"| bare loop, connections: {loops} | {limit:,.0f} | {rate / limit:.2f} |")
    lines += [
        "",
        f"The first email came {first - started:.1f} s after the order, the last after {last - started:.1f} s.",
        f"Of the workers' CPU {cpu / RECIPIENTS * 1e6:,.0f} us an email. Memory of a worker: {tenth:.0f} MiB after a",
        f"tenth, at most {peak:.0f} MiB. The sink received {RECIPIENTS:,}; each recipient's is noted as sent.",
    ]
    return "\n".join(lines) + "\n"


async def main() -> None:
    with tempfile.TemporaryDirectory() as root:
        async with Campaigning.opened(Path(root)) as world:
            report = await measure(world)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(report)
    print(report)


if __name__ == "__main__":
    uvloop.run(main())
