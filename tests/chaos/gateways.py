"""A gateway in a process of its own, in front of a service in the test's."""

import asyncio
import os
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

import aiohttp
from aiohttp import web

from devstack.ports import free_ports
from shared.listener import listening
from shared.settings import ProcessSettings
from shared.testing import eventually


@dataclass(frozen=True)
class Gateway:
    url: str
    admin: str
    port: int
    pid: int


@asynccontextmanager
async def in_front_of(
    handler: Callable[[web.Request], Awaitable[web.StreamResponse]], http: aiohttp.ClientSession, **environ: str
) -> AsyncIterator[Gateway]:
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", handler)
    port, admin = free_ports(2)
    async with listening(app, ProcessSettings(shutdown_seconds=1), 0) as service:
        base = f"http://127.0.0.1:{service.port}"
        own = {
            "PORT": str(port),
            "ADMIN_PORT": str(admin),
            "DRAIN_SECONDS": "0",
            "JWKS_URL": f"{base}/.well-known/jwks.json",
            "LIMIT_DEFAULT": "1000000/1",
            "LIMIT_CREDENTIALS": "1000000/1",
            "LOG_LEVEL": "warning",
            **{f"UPSTREAM_{name}": base for name in ("USERS", "MEDIA", "NOTIFIER")},
        }
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "services.gateway", env={**os.environ, **own, **environ}
        )
        gateway = Gateway(f"http://127.0.0.1:{port}", f"http://127.0.0.1:{admin}", port, process.pid)
        try:

            async def ready() -> bool:
                assert process.returncode is None
                try:
                    async with http.get(f"{gateway.admin}/health/ready") as response:
                        return response.status == 200
                except aiohttp.ClientError:
                    return False

            await eventually(ready)
            yield gateway
        finally:
            if process.returncode is None:
                process.kill()
            await process.wait()
