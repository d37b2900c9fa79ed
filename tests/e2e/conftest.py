"""The whole platform, started as `make dev` starts it, once for each stage."""

import io
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import aiohttp
import asyncpg
import pytest
import pyvips

from devstack.stack import Stack
from devstack.topology import Topology
from shared.ids import new_id
from shared.testing import eventually
from tests.serving import Answer, Api

PASSWORD = "correct horse battery"


def photo(width: int = 1600, height: int = 1200, seed: int = 1) -> bytes:
    """A JPEG that is not one flat colour."""
    image = pyvips.Image.gaussnoise(width, height, mean=128, sigma=40, seed=seed).cast("uchar")
    data: bytes = image.bandjoin([image.fliphor(), image.flipver()]).copy(interpretation="srgb").jpegsave_buffer(Q=70)
    return data


class Person(Api):
    """Somebody who has registered and logged in."""

    def __init__(self, base: str, http: aiohttp.ClientSession) -> None:
        super().__init__(base, http)
        self.name = str(new_id())
        self.email = f"{self.name}@example.org"
        self.token = ""
        self.id = ""

    async def join(self) -> None:
        body = {"email": self.email, "password": PASSWORD, "display_name": "Ann <b>"}
        made = await self.post("/api/v1/users", body)
        assert made.status == 201, made
        self.id = made.body["id"]
        session = await self.post("/api/v1/sessions", {"email": self.email, "password": PASSWORD})
        assert session.status == 201, session
        self.token = session.body["access_token"]

    async def call(self, method: str, path: str, json: Any = None, **more: Any) -> Answer:
        more.setdefault("token", self.token or None)
        return await super().call(method, path, json, **more)

    async def upload(self, data: bytes, content_type: str = "image/jpeg", **headers: str) -> Answer:
        sent = {"Authorization": f"Bearer {self.token}", "Content-Type": content_type, **headers}
        async with self.http.post(f"{self.base}/api/v1/media", data=io.BytesIO(data), headers=sent) as response:
            return Answer(response.status, response.headers, await response.json(content_type=None))

    async def media(self, media_id: str) -> Any:
        return (await self.get(f"/api/v1/media/{media_id}")).body

    async def until(self, media_id: str, status: str) -> Any:
        """The media once it has this status."""

        async def reached() -> Any:
            media = await self.media(media_id)
            return media if media["status"] == status else None

        return await eventually(reached, within=60)


@dataclass
class Platform:
    stack: Stack
    http: aiohttp.ClientSession

    async def person(self) -> Person:
        assert self.stack.urls.gateway
        person = Person(self.stack.urls.gateway, self.http)
        await person.join()
        return person

    async def mails(self, to: str) -> list[dict[str, Any]]:
        async with self.http.get(f"{self.stack.urls.mail}/messages", params={"to": to}) as response:
            found: list[dict[str, Any]] = json.loads(await response.read())
        return found


async def administrator(platform: Platform) -> Person:
    person = await platform.person()
    connection = await asyncpg.connect(platform.stack.urls.postgres_primary)
    try:
        await connection.execute("UPDATE users.accounts SET role = 'admin' WHERE id::text = $1", person.id)
    finally:
        await connection.close()
    session = await person.post("/api/v1/sessions", {"email": person.email, "password": PASSWORD})
    person.token = session.body["access_token"]
    return person


@pytest.fixture(scope="session", params=[1, 4], ids=["stage 1", "stage 4"])
async def platform(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Platform]:
    root = tmp_path_factory.mktemp(f"stage-{request.param}")
    stack = Stack(Topology.stage(request.param), root=root, durable=False, keep_data=False)
    async with stack, aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=60)) as http:
        yield Platform(stack, http)


@pytest.fixture
async def ann(platform: Platform) -> Person:
    return await platform.person()
