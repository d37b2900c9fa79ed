"""A gateway on a real port, in front of a small real server that stands for the services."""

import io
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import aiohttp
import jwt
import pytest
from aiohttp import web
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from services.gateway.app import api
from services.gateway.settings import Settings
from services.gateway.upstreams import UPSTREAMS
from shared import auth, http_client, logs, tracing
from shared.auth import Principal, Role
from shared.ids import new_id
from shared.listener import listening
from shared.runner import Process
from shared.settings import ProcessSettings

AccessLog = Callable[[], Awaitable[list[dict[str, Any]]]]
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@asynccontextmanager
async def serving(app: web.Application) -> AsyncIterator[str]:
    """`app` on a free port, run as `shared.runner` runs a service's; its base URL."""
    async with listening(app, ProcessSettings(shutdown_seconds=5), 0) as listener:
        yield f"http://127.0.0.1:{listener.port}"


@dataclass
class Keys:
    """Stands for the users service where tokens are concerned."""

    private: Ed25519PrivateKey
    jwks_url: str

    def token(self, *, user_id: UUID | None = None, role: Role = Role.USER, seconds: int = 600) -> str:
        now = int(time.time())
        principal = Principal(user_id or new_id(), new_id(), role, now + seconds)
        return auth.issue(principal, "test", self.private, now)

    def bearer(self, **claims: Any) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.token(**claims)}"}


@pytest.fixture
async def keys(opened: AsyncExitStack) -> Keys:
    private = Ed25519PrivateKey.generate()
    jwk = jwt.algorithms.OKPAlgorithm.to_jwk(private.public_key(), as_dict=True)

    async def answer(_request: web.Request) -> web.Response:
        return web.json_response({"keys": [{**jwk, "kid": "test", "alg": "EdDSA", "use": "sig"}]})

    app = web.Application()
    app.router.add_get("/jwks.json", answer)
    return Keys(private, await opened.enter_async_context(serving(app)) + "/jwks.json")


class World:
    """Starts services and gateways for one test, and ends them after it."""

    def __init__(self, opened: AsyncExitStack, keys: Keys) -> None:
        self._stack = opened
        self._keys = keys

    async def service(self, handler: Handler) -> str:
        """A server that answers every request by `handler`; its base URL."""
        app = web.Application(client_max_size=2**30)
        app.router.add_route("*", "/{path:.*}", handler)
        return await self._stack.enter_async_context(serving(app))

    async def gateway(self, *instances: str, **settings: Any) -> str:
        """A gateway with `instances` behind every prefix; its base URL."""
        upstream = {u.name: instances for u in UPSTREAMS} | settings.pop("upstream", {})
        own = Settings(jwks_url=self._keys.jwks_url, upstream=upstream, **settings)
        await self._stack.enter_async_context(tracing.opened("gateway", None, 0.0))
        process = Process(self._stack, await self._stack.enter_async_context(http_client.session()))
        return await self._stack.enter_async_context(serving(await api(process, own)))

    async def in_front_of(self, handler: Handler, **settings: Any) -> str:
        return await self.gateway(await self.service(handler), **settings)


@pytest.fixture
def world(opened: AsyncExitStack, keys: Keys) -> World:
    return World(opened, keys)


@pytest.fixture
async def http() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(auto_decompress=False) as session:
        yield session


@pytest.fixture
def access_log(monkeypatch: pytest.MonkeyPatch) -> AccessLog:
    """The lines that the gateway has written."""
    written = io.BytesIO()
    monkeypatch.setattr(logs, "_output", logs._Output(written))
    monkeypatch.setattr(logs, "_service", "gateway")

    async def read() -> list[dict[str, Any]]:
        return [json.loads(line) for line in written.getvalue().splitlines()]

    return read
