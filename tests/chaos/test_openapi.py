"""What each service answers is what its OpenAPI document says, whatever is sent to it: no 5xx, no other shape."""

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pytest

from services.media.app import SERVICE as MEDIA
from services.notifier.app import SERVICE as NOTIFIER
from services.users.app import SERVICE as USERS
from shared.runner import Service
from shared.settings import DataSettings
from tests.backing import Backing
from tests.integration.media.images import photo
from tests.serving import Api, serving

ANN = {"email": "ann@example.org", "password": "correct horse battery"}
EXAMPLES = 10  # an operation and phase; the coverage phase alone makes some 20


@dataclass
class Owner:
    users: Api
    token: str


@asynccontextmanager
async def opened(service: Service[Any], backing: Backing, **more: Any) -> AsyncIterator[Api]:
    async with backing.schema(service.name) as schema:
        common = DataSettings(database_url=schema.url, redis_url=backing.redis, bus="inline", drain_seconds=0)
        settings = msgspec.convert(msgspec.structs.asdict(common) | more, service.settings)
        async with serving(service, settings) as api:
            yield api


@pytest.fixture
async def ann(backing: Backing) -> AsyncIterator[Owner]:
    argon2 = {"argon2_memory_kib": 8192, "argon2_time": 1}
    async with opened(USERS, backing, signing_key_secret="s" * 32, link_secret="l" * 32, **argon2) as users:
        await users.post("/api/v1/users", {**ANN, "display_name": "Ann"})
        yield Owner(users, (await users.post("/api/v1/sessions", ANN)).body["access_token"])


async def examined(api: Api, token: str, tmp_path: Path, config: str) -> None:
    """Have schemathesis examine the API; the same requests every time."""
    path = tmp_path / "schemathesis.toml"
    path.write_text(config)
    command = [
        "-m", "schemathesis.cli", "--config-file", str(path), "run", f"{api.base}/openapi.json",
        "--header", f"Authorization: Bearer {token}", "--phases", "examples,coverage,fuzzing",
        "--max-examples", str(EXAMPLES), "--generation-deterministic", "--request-timeout", "10", "--no-color",
    ]  # fmt: skip
    process = await asyncio.create_subprocess_exec(
        sys.executable, *command, cwd=tmp_path, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    try:
        output, _ = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
    assert process.returncode == 0, output.decode()
    print(output.decode().partition("Test cases:")[2].strip().splitlines()[0])


async def test_users(ann: Owner, tmp_path: Path) -> None:
    me = (await ann.users.get("/api/v1/users/me", token=ann.token)).body["id"]
    await examined(
        ann.users, ann.token, tmp_path,
        f"""
        [[operations]]  # no schema says what an address is, or which passwords are common
        include-name = "POST /api/v1/users"
        checks.positive_data_acceptance.enabled = false
        [[operations]]  # nor what the current password is
        include-name = "PUT /api/v1/users/me/password"
        checks.positive_data_acceptance.enabled = false
        [[operations]]
        include-name = "GET /api/v1/users/{{user_id}}"
        parameters = {{ "path.user_id" = "{me}" }}
        """,
    )  # fmt: skip


async def test_media(ann: Owner, backing: Backing, tmp_path: Path) -> None:
    jwks = f"{ann.users.base}/.well-known/jwks.json"
    store = {"object_store_url": (tmp_path / "store").as_uri(), "url_secret": "s" * 32}
    async with opened(MEDIA, backing, jwks_url=jwks, **store) as media:
        headers = {"Authorization": f"Bearer {ann.token}", "Content-Type": "image/jpeg"}
        async with media.http.post(f"{media.base}/api/v1/media", data=photo(64, 48), headers=headers) as answer:
            media_id = (await answer.json())["id"]
        await examined(
            media, ann.token, tmp_path,
            f"""
            [[operations]]  # no schema says what an image is
            include-name = "POST /api/v1/media"
            checks.positive_data_acceptance.enabled = false
            [[operations]]
            include-path-regex = "media_id"
            exclude-method = "DELETE"
            parameters = {{ "path.media_id" = "{media_id}" }}
            """,
        )  # fmt: skip


async def test_notifier(ann: Owner, backing: Backing, tmp_path: Path) -> None:
    jwks = f"{ann.users.base}/.well-known/jwks.json"
    async with opened(NOTIFIER, backing, jwks_url=jwks, smtp_url=backing.smtp, link_secret="l" * 32) as notifier:
        await examined(
            notifier, ann.token, tmp_path,
            """
            [[operations]]  # it has no end
            include-path = "/api/v1/notifications/stream"
            enabled = false
            """,
        )  # fmt: skip
