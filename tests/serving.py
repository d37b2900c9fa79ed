"""A service's real application in the test's own process, on a port of its own."""

from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any

import aiohttp

from devstack.ports import free_port
from shared import consistency, http_client
from shared.listener import listening
from shared.runner import Process, Service


@dataclass(frozen=True)
class Answer:
    status: int
    headers: Mapping[str, str]
    body: Any


class Api:
    """A client of one base URL: `await api.post("/api/v1/users", {...}, token=...)`.

    It carries the consistency token on, as a browser does with the gateway's cookie.
    """

    def __init__(self, base: str, http: aiohttp.ClientSession) -> None:
        self.base = base
        self.http = http
        self._position = ""

    async def call(
        self, method: str, path: str, json: Any = None, *, token: str | None = None, **headers: str
    ) -> Answer:
        """Header names are given with underscores: `if_match='"v1"'`."""
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        if self._position:
            sent.setdefault(consistency.HEADER, self._position)
        if token is not None:
            sent["Authorization"] = f"Bearer {token}"
        async with self.http.request(method, self.base + path, json=json, headers=sent) as response:
            is_json = response.content_type.endswith("json")
            body = await response.json(content_type=None) if is_json else await response.read()
            self._position = response.headers.get(consistency.HEADER, self._position)
            return Answer(response.status, response.headers, body)

    async def get(self, path: str, **more: Any) -> Answer:
        return await self.call("GET", path, **more)

    async def post(self, path: str, json: Any = None, **more: Any) -> Answer:
        return await self.call("POST", path, json, **more)


@asynccontextmanager
async def serving(service: Service[Any], settings: Any) -> AsyncIterator[Api]:
    """The API of `service` with these settings."""
    async with AsyncExitStack() as stack:
        http = await stack.enter_async_context(http_client.session())
        process = Process(stack, http)
        application = await service.api(process, settings)
        process.deliver()
        port = free_port()
        await stack.enter_async_context(listening(application, settings, port))
        process.health.started()
        client = await stack.enter_async_context(
            aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=30), cookie_jar=aiohttp.DummyCookieJar())
        )
        yield Api(f"http://127.0.0.1:{port}", client)
