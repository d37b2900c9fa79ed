"""Processes that are killed in mid-work, on the stage where they are separate."""

import asyncio
import json
import signal

import pytest

from shared.testing import eventually
from tests.e2e.conftest import Person, Platform, photo

pytestmark = pytest.mark.timeout(180)


@pytest.mark.parametrize("platform", [4], ids=["stage 4"], indirect=True)
async def test_a_worker_killed_in_mid_work_finishes_each_photo_once(platform: Platform, ann: Person) -> None:
    data = [photo(3000, 2000, seed=n) for n in range(4)]
    worker = platform.stack.child("media-worker-0")
    uploaded = await asyncio.gather(*(ann.upload(d) for d in data))
    ids = [answer.body["id"] for answer in uploaded]

    async def some_are_done() -> bool:
        return any([(await ann.media(i))["status"] == "ready" for i in ids])

    await eventually(some_are_done, within=60, every=0.01)
    await worker.kill(signal.SIGKILL)
    await worker.start()
    for media_id in ids:
        await ann.until(media_id, "ready")

    async def all_told() -> bool:
        items = (await ann.get("/api/v1/notifications?limit=100")).body["items"]
        return all(sum(media_id in json.dumps(item) for item in items) >= 1 for media_id in ids)

    await eventually(all_told, within=30)
    items = (await ann.get("/api/v1/notifications?limit=100")).body["items"]
    assert [sum(media_id in json.dumps(item) for item in items) for media_id in ids] == [1] * len(ids)
    mails = [mail["text"] for mail in await platform.mails(ann.email)]
    print(f"worker killed among {len(ids)} photos: all ready, one notification each, {len(mails)} emails")
