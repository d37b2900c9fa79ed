"""What an upload costs in memory, whatever its size: the API as a process of its own."""

import asyncio
import os
import re
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path

import aiohttp
import msgspec
import pytest

from devstack.ports import free_port
from services.media.settings import Settings
from shared.ids import new_id
from shared.testing import eventually
from tests.integration.media import s3
from tests.integration.media.conftest import Keys

ROOT = Path(__file__).parents[3]
MIB = 2**20


@contextmanager
def _api(settings: Settings, environ: dict[str, str], log: Path, port: int) -> Iterator[int]:
    """Its process id."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "services.media", "api"],
            cwd=ROOT,
            stdout=output,
            stderr=output,
            env={
                "PATH": os.environ["PATH"],
                "DATABASE_URL": settings.database_url,
                "DATABASE_PGBOUNCER": str(settings.database_pgbouncer).lower(),
                "BUS": "inline",
                "OBJECT_STORE_URL": settings.object_store_url,
                "MEDIA_URL_SECRET": settings.url_secret,
                "JWKS_URL": settings.jwks_url,
                "UPLOAD_MAX_BYTES": str(2**30),
                "PORT": str(port),
                "ADMIN_PORT": "0",
                "DRAIN_SECONDS": "0",
                **environ,
            },
        )
    try:
        yield process.pid
    finally:
        process.terminate()
        process.wait(30)


def _memory(pid: int, field: str) -> float:
    """MiB."""
    found = re.search(rf"^{field}:\s+(\d+)", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    assert found
    return int(found[1]) / 1024


def _forget_peak(pid: int) -> None:
    Path(f"/proc/{pid}/clear_refs").write_text("5")


async def _upload(http: aiohttp.ClientSession, url: str, bearer: dict[str, str], seed: int, size: int) -> int:
    piece = bytes(64 * 1024)

    async def body() -> AsyncIterator[bytes]:
        yield b"\xff\xd8\xff" + bytes([seed])
        for _ in range(size // len(piece)):
            yield piece

    headers = {**bearer, "Content-Type": "image/jpeg", "Content-Length": str(4 + size)}
    async with http.post(f"{url}/api/v1/media", data=body(), headers=headers) as answer:
        return answer.status


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("store", "uploads", "size"), [("local", 8, 200 * MIB), ("s3", 8, 50 * MIB)])
async def test_uploads_take_little_memory(
    media_settings: Settings, keys: Keys, tmp_path: Path, store: str, uploads: int, size: int
) -> None:
    with _store(store, tmp_path) as environ:
        settings = media_settings
        if environ:
            settings = msgspec.structs.replace(media_settings, object_store_url=f"s3://{s3.BUCKET}")
        port = free_port()
        url = f"http://127.0.0.1:{port}"
        bearer = keys.bearer(new_id())
        with _api(settings, environ, tmp_path / "api.log", port) as pid:
            async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(100)) as http:

                async def warm() -> bool:
                    try:
                        return await _upload(http, url, bearer, 255, MIB) == 202
                    except aiohttp.ClientConnectionError:
                        return False

                await eventually(warm, within=30)
                await asyncio.gather(*(_upload(http, url, bearer, 100 + n, MIB) for n in range(uploads)))
                before = _memory(pid, "VmRSS")
                _forget_peak(pid)
                statuses = await asyncio.gather(*(_upload(http, url, bearer, n, size) for n in range(uploads)))
                grown = _memory(pid, "VmHWM") - before
        assert statuses == [202] * uploads, (tmp_path / "api.log").read_text()[-2000:]
    each = grown / uploads
    print(f"{store}: {uploads} uploads of {size // MIB} MiB at a time: {grown:.1f} MiB more, {each:.2f} MiB each")
    # Mostly what the loop reads at a time and aiohttp holds of a connection; parts held back for S3 would be 10 MiB.
    assert each < 1


@contextmanager
def _store(kind: str, folder: Path) -> Iterator[dict[str, str]]:
    """The environment by which the API finds the store."""
    if kind == "local":
        yield {}
    elif s3.PYTHON is None:
        pytest.skip(s3.MISSING)
    else:
        with s3.serving(folder / "s3.log") as server:
            yield server.environ
