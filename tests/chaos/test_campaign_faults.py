"""A campaign while its senders are killed: nobody gets two emails, and who may have got none is known and explained."""

from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest

from bench.campaign import Campaigning
from shared.testing import eventually

pytestmark = pytest.mark.timeout(400)

RECIPIENTS = 2000
KILLS = 3
# As short as the time that one attempt may take allows.
ENVIRONMENT = {
    "EMAIL_CONCURRENCY": "16",
    "SMTP_COMMAND_SECONDS": "1",
    "SMTP_DATA_SECONDS": "1",
    "EMAIL_LEASE_SECONDS": "5",
}


@pytest.fixture
async def world(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Campaigning]:
    root: Path = tmp_path_factory.mktemp("campaign")
    async with Campaigning.opened(root) as opened:
        yield opened


async def in_the_sink(http: aiohttp.ClientSession, mail: str) -> dict[str, int]:
    async with http.get(f"{mail}/recipients") as response:
        found: dict[str, int] = await response.json()
        return found


async def test_a_worker_killed_three_times_sends_everybody_one_email(world: Campaigning) -> None:
    await world.people(RECIPIENTS)
    async with world.worker(**ENVIRONMENT):  # another one works on all the while
        victim = await world.start_worker(**ENVIRONMENT)
        campaign = await world.launch()
        for number in range(KILLS):

            async def far_enough(share: float = (number + 1) / (KILLS + 1)) -> bool:
                return await world.received() >= share * RECIPIENTS * 0.8

            await eventually(far_enough, within=120, every=0.01)
            victim.kill()
            await victim.wait()
            victim = await world.start_worker(**ENVIRONMENT)

        async def over() -> bool:
            counts = await world.counts(campaign)
            return counts.keys() <= {"sent", "ambiguous"} and sum(counts.values()) == RECIPIENTS

        await eventually(over, within=180, every=0.2)
        counts = await world.counts(campaign)
        victim.terminate()
        await victim.wait()
    arrived = await in_the_sink(world.http, world.stack.urls.mail)
    async with world.db.transaction() as tx:
        rows = await tx.fetch("SELECT r.email, e.state, e.last_error FROM emails e JOIN recipients r USING (user_id)")
    unsure = [row for row in rows if row["state"] == "ambiguous"]
    lost = [row for row in unsure if row["email"] not in arrived]
    print(
        f"{KILLS} kills among {RECIPIENTS} recipients: {counts.get('sent', 0)} noted as sent, twice"
        f" {sum(number > 1 for number in arrived.values())}, ambiguous"
        f" {len(unsure)}: of these {len(unsure) - len(lost)} had arrived, and {len(lost)} had not left yet"
    )
    assert len(rows) == RECIPIENTS
    assert max(arrived.values()) == 1
    assert all(row["email"] in arrived for row in rows if row["state"] == "sent")
    # Only what was between the note that it leaves and the note that it has left, in the hands of who was killed.
    assert {row["last_error"] for row in unsure} <= {"the sender went away while sending"}
    assert len(unsure) <= KILLS * 16
