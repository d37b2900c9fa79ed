"""Media as a whole: API and worker in the test's process, on a real database, a real store and a bus."""

import io
import os
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID

import aiohttp
import jwt
import msgspec
import pytest
from aiohttp import web
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from services.media import app
from services.media.settings import Settings
from shared import auth, consistency, http_client
from shared.auth import Principal, Role
from shared.database import Connection, Database
from shared.health import Health
from shared.ids import new_id
from shared.runner import Process
from shared.settings import DataSettings
from shared.testing import eventually
from tests.integration.media import corpus


@asynccontextmanager
async def serving(application: web.Application) -> AsyncIterator[str]:
    """`application` on a free port, run as `shared.runner` runs a service's; its base URL."""
    runner = web.AppRunner(
        application, access_log=None, handler_cancellation=True, auto_decompress=False, shutdown_timeout=0.2
    )
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        host, port = runner.addresses[0][:2]
        yield f"http://{host}:{port}"
    finally:
        await runner.cleanup()


@dataclass
class Keys:
    """Stands for the users service where tokens are concerned."""

    private: Ed25519PrivateKey
    jwks_url: str

    def bearer(self, user_id: UUID) -> dict[str, str]:
        now = int(time.time())
        token = auth.issue(Principal(user_id, new_id(), Role.USER, now + 600), "test", self.private, now)
        return {"Authorization": f"Bearer {token}"}


@pytest.fixture
async def keys() -> AsyncIterator[Keys]:
    private = Ed25519PrivateKey.generate()
    jwk = jwt.algorithms.OKPAlgorithm.to_jwk(private.public_key(), as_dict=True)

    async def answer(_request: web.Request) -> web.Response:
        return web.json_response({"keys": [{**jwk, "kid": "test", "alg": "EdDSA", "use": "sig"}]})

    application = web.Application()
    application.router.add_get("/jwks.json", answer)
    async with serving(application) as url:
        yield Keys(private, f"{url}/jwks.json")


@pytest.fixture
def media_settings(data_settings: DataSettings, keys: Keys, tmp_path: Path) -> Settings:
    return Settings(
        **msgspec.structs.asdict(data_settings) | {"bus": "inline", "redis_url": None, "port": 0},
        object_store_url=(tmp_path / "store").as_uri(),
        url_secret="s" * 32,
        jwks_url=keys.jwks_url,
        processes=2,
        max_animation_pixels=corpus.ANIMATION_PIXELS,
        sweep_seconds=0.2,
    )


@dataclass
class World:
    """A running media service, and one user of it."""

    url: str
    keys: Keys
    http: aiohttp.ClientSession
    settings: Settings
    store: Path
    db: Database
    user_id: UUID
    token: str = ""

    @property
    def bearer(self) -> dict[str, str]:
        return self.keys.bearer(self.user_id)

    async def call(
        self, method: str, path: str, headers: dict[str, str] | None = None, **options: Any
    ) -> tuple[int, Any, Any]:
        """Status, body (decoded where it is JSON) and headers."""
        all_headers = {**self.bearer, consistency.HEADER: self.token, **(headers or {})}
        async with self.http.request(method, self.url + path, headers=all_headers, **options) as answer:
            body = await answer.read()
            self.token = answer.headers.get(consistency.HEADER, self.token)
            json = answer.content_type.endswith("json") and bool(body)
            return answer.status, msgspec.json.decode(body) if json else body, answer.headers

    async def upload(self, data: Any, content_type: str = "image/jpeg", **headers: str) -> tuple[int, Any, Any]:
        body = io.BytesIO(data) if isinstance(data, bytes) and data else data
        return await self.call("POST", "/api/v1/media", {"Content-Type": content_type, **headers}, data=body)

    async def uploaded(self, data: bytes, content_type: str = "image/jpeg") -> Any:
        status, media, _ = await self.upload(data, content_type)
        assert status == 202, media
        return media

    async def settled(self, media_id: str) -> Any:
        """The media once they are ready or failed."""

        async def ask() -> Any:
            status, media, _ = await self.call("GET", f"/api/v1/media/{media_id}")
            assert status == 200, media
            return media if media["status"] != "processing" else None

        return await eventually(ask, within=60)

    def stored(self) -> list[str]:
        """What is in the store, half-written files included."""
        # Not `rglob`, which raises when a folder goes while it looks: the store removes those that have become empty.
        found = [Path(folder, name) for folder, _, names in os.walk(self.store) for name in names]
        return sorted(str(path.relative_to(self.store)) for path in found)

    async def blobs(self) -> int:
        """How many blobs the database knows of."""
        count: int = await self.db.read(_count_blobs)
        return count

    async def is_empty(self) -> bool:
        return not self.stored() and await self.blobs() == 0


async def _count_blobs(connection: Connection) -> int:
    count: int = await connection.fetchval("SELECT count(*) FROM blobs")
    return count


@asynccontextmanager
async def running(settings: Settings, keys: Keys, *, worker: bool = True) -> AsyncIterator[World]:
    async with AsyncExitStack() as stack:
        process = Process(stack, await stack.enter_async_context(http_client.session()))
        if worker:
            await app.worker(process, settings)
        application = await app.api(process, settings)
        process.deliver()
        db = await stack.enter_async_context(
            Database.opened("media", msgspec.structs.replace(settings, database_replica_urls=()), Health())
        )
        http = await stack.enter_async_context(aiohttp.ClientSession())
        url = await stack.enter_async_context(serving(application))
        store = Path(settings.object_store_url.removeprefix("file://"))
        yield World(url, keys, http, settings, store, db, new_id())


@pytest.fixture
async def world(media_settings: Settings, keys: Keys) -> AsyncIterator[World]:
    async with running(media_settings, keys) as opened:
        yield opened
