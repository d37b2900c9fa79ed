"""The worker: what becomes of uploads, also when things die in the middle."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import UUID

import msgspec
import psutil
import pytest

from services.media import models, repository
from services.media.consumed import MediaUploaded
from services.media.processing import Processing
from services.media.settings import Settings
from shared.database import Connection
from shared.ids import new_id
from shared.testing import eventually
from tests.integration.media import images
from tests.integration.media.conftest import Keys, World, running

ROOT = Path(__file__).parents[3]
MANY = 60


async def _outbox(connection: Connection) -> list[dict[str, Any]]:
    rows = await connection.fetch("SELECT type, data FROM outbox ORDER BY id")
    return [{"type": row["type"], **msgspec.json.decode(row["data"])} for row in rows]


@pytest.mark.parametrize(
    ("data", "reason"),
    [(images.photo()[: len(images.photo()) // 2], "damaged or incomplete"), (images.bomb(), "900.0 megapixels")],
    ids=["truncated", "bomb"],
)
async def test_what_cannot_be_processed_fails_with_a_reason(world: World, data: bytes, reason: str) -> None:
    media = await world.settled((await world.uploaded(data, "image/png"))["id"])
    assert media["status"] == "failed"
    assert reason in media["failure"]
    assert media["variants"] == []
    good = await world.settled((await world.uploaded(images.photo(300, 200)))["id"])
    assert good["status"] == "ready"
    await world.call("DELETE", f"/api/v1/media/{media['id']}")
    await world.call("DELETE", f"/api/v1/media/{good['id']}")
    await eventually(world.is_empty)


@pytest.mark.parametrize("left", [0, 1000])
async def test_an_original_that_is_not_whole_any_more_is_lost(
    world: World, monkeypatch: pytest.MonkeyPatch, left: int
) -> None:
    fetch = Processing._fetch

    async def fetch_of_damaged(self: Processing, event: MediaUploaded, target: Path) -> None:
        os.truncate(world.store / models.original_key(event.blob_id), left)
        await fetch(self, event, target)

    monkeypatch.setattr(Processing, "_fetch", fetch_of_damaged)
    media = await world.settled((await world.uploaded(images.photo(300, 200)))["id"])
    assert (media["status"], media["failure"]) == ("failed", "the original is not there any more, or not whole")


async def test_deleted_before_and_while_it_is_processed(world: World) -> None:
    uploads = [await world.uploaded(images.photo(1600, 1200, seed=seed)) for seed in range(4)]
    for media in uploads:
        assert (await world.call("DELETE", f"/api/v1/media/{media['id']}"))[0] == 204
    last = await world.settled((await world.uploaded(images.photo(300, 200)))["id"])
    await world.call("DELETE", f"/api/v1/media/{last['id']}")
    await eventually(world.is_empty)

    async def relayed() -> bool:
        return not await world.db.read(_outbox) and await world.is_empty()

    await eventually(relayed)


async def test_all_of_an_owner_goes_a_few_at_a_time(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repository, "_AT_ONCE", 2)
    for seed in (1, 2, 3, 1, 1):  # three of them are one blob
        media = await world.settled((await world.uploaded(images.photo(300, 200, seed=seed)))["id"])
    async with world.db.transaction() as tx:
        await repository.delete_all_of(tx, UUID(media["owner_id"]))
    await eventually(world.is_empty)


async def test_a_deletion_does_not_wait_for_the_next_sweep(media_settings: Settings, keys: Keys) -> None:
    async with running(msgspec.structs.replace(media_settings, sweep_seconds=3600.0), keys) as world:
        media = await world.settled((await world.uploaded(images.photo(300, 200)))["id"])
        assert not await world.is_empty()
        await world.call("DELETE", f"/api/v1/media/{media['id']}")
        await eventually(world.is_empty)


@pytest.fixture
def kafka_settings(media_settings: Settings) -> Settings:
    return msgspec.structs.replace(media_settings, bus="kafka", upload_max_bytes=2**30)


@contextmanager
def _worker(settings: Settings, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    environ = {
        "PATH": os.environ["PATH"],
        "DATABASE_URL": settings.database_url,
        "DATABASE_PGBOUNCER": str(settings.database_pgbouncer).lower(),
        "KAFKA_BOOTSTRAP": ",".join(settings.kafka_bootstrap),
        "KAFKA_IDEMPOTENCE": str(settings.kafka_idempotence).lower(),
        "KAFKA_SESSION_TIMEOUT_SECONDS": "6",
        "KAFKA_INSTANCE_ID": "media-worker",  # each takes the place of the one before it
        "OBJECT_STORE_URL": settings.object_store_url,
        "MEDIA_URL_SECRET": settings.url_secret,
        "JWKS_URL": settings.jwks_url,
        "ADMIN_PORT": "0",
        "DRAIN_SECONDS": "0",
        "PROCESSES": "1",
        "TMPDIR": str(log.parent),
    }
    with log.open("ab") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "services.media", "worker"], cwd=ROOT, env=environ, stdout=output, stderr=output
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


async def test_kill_9_in_the_middle(kafka_settings: Settings, keys: Keys, tmp_path: Path) -> None:
    """The photo is finished after the restart, once; nothing of the first attempt is left."""
    log = tmp_path / "worker.log"
    async with running(kafka_settings, keys, worker=False) as world:
        with _worker(kafka_settings, log) as first:
            media = await world.uploaded(images.photo(7000, 5000, "png"), "image/png")
            busy: list[psutil.Process] = []

            async def processing() -> bool:
                with suppress(psutil.Error):
                    busy[:] = psutil.Process(first.pid).children()
                return bool(busy)

            await eventually(processing, within=20, every=0.01)
            os.kill(first.pid, signal.SIGKILL)

        async def childless() -> bool:
            return not any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in busy)

        await eventually(childless)
        assert (await world.call("GET", f"/api/v1/media/{media['id']}"))[1]["status"] == "processing"
        with _worker(kafka_settings, log) as second:
            media = await world.settled(media["id"])
            assert (media["status"], media["version"]) == ("ready", 2), log.read_text()
            assert len(world.stored()) == 4
            second.terminate()
            assert await asyncio.to_thread(second.wait, 20) == 0, log.read_text()
        assert "process_failed" not in log.read_text()


async def test_one_owners_many_uploads_delay_nobody_elses(kafka_settings: Settings, keys: Keys, tmp_path: Path) -> None:
    """Who uploads one image after another's sixty waits for a few of them at most."""
    async with running(kafka_settings, keys, worker=False) as world:
        uploads = [await world.uploaded(images.photo(64, 48, seed=seed)) for seed in range(MANY)]
        other = new_id()
        status, media, _ = await world.upload(images.photo(64, 48, seed=MANY), **keys.bearer(other))
        assert status == 202, media
        with _worker(kafka_settings, tmp_path / "worker.log"):
            for upload in uploads:
                await world.settled(upload["id"])

            async def finished() -> list[UUID]:
                owners = await world.db.read(_owners_in_order)
                return owners if len(owners) > MANY else []

            order = await eventually(finished, within=30)
    position = order.index(other)
    print(f"the other's one image was number {position + 1} of {len(order)}; first come, first served: {len(order)}")
    assert position < MANY // 3


async def _owners_in_order(connection: Connection) -> list[UUID]:
    """Of the media that are ready, in the order in which they became so."""
    rows = await connection.fetch("SELECT owner_id FROM media WHERE status = 'ready' ORDER BY updated_at")
    return [row["owner_id"] for row in rows]


def test_does_not_start_without_its_settings() -> None:
    process = subprocess.run(
        [sys.executable, "-m", "services.media", "worker"],
        cwd=ROOT, env={"PATH": os.environ["PATH"], "BUS": "inline"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert process.returncode == 78
    names = {line.partition(":")[0] for line in process.stderr.splitlines()}
    assert {"DATABASE_URL", "OBJECT_STORE_URL", "JWKS_URL"} <= names
    assert any("URL_SECRET" in name for name in names)
