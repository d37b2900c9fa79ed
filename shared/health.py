"""Liveness and readiness, on a port of their own.

Liveness is "the loop turns". Readiness is "my own resources answer", asked at most once a second however many ask, and
false from the first SIGTERM on, so that the balancer sends nothing more while the process finishes what it has.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable

from aiohttp import web

from shared import metrics

Check = Callable[[], Awaitable[object]]

_FRESH_SECONDS = 1.0
_CHECK_SECONDS = 2.0


class Health:
    def __init__(self) -> None:
        self._checks: dict[str, Check] = {}
        self._started = False
        self._stopping = False
        self._faults: dict[str, str] = {}
        self._asked_at = float("-inf")
        self._lock = asyncio.Lock()

    def add(self, name: str, check: Check) -> None:
        """`check` raises when the resource does not answer; it is given two seconds."""
        self._checks[name] = check

    def started(self) -> None:
        self._started = True

    def stopping(self) -> None:
        self._stopping = True

    async def faults(self) -> dict[str, str]:
        """What keeps this process from being ready, by name; empty when it is."""
        if self._stopping:
            return {"process": "stopping"}
        if not self._started:
            return {"process": "starting"}
        async with self._lock:
            if time.monotonic() - self._asked_at > _FRESH_SECONDS:
                outcomes = await asyncio.gather(*(self._outcome(check) for check in self._checks.values()))
                self._faults = {n: o for n, o in zip(self._checks, outcomes, strict=True) if o is not None}
                self._asked_at = time.monotonic()
        return self._faults

    @staticmethod
    async def _outcome(check: Check) -> str | None:
        try:
            async with asyncio.timeout(_CHECK_SECONDS):
                await check()
        except Exception as error:  # noqa: BLE001 - whatever it is, this resource does not answer
            return str(error) or type(error).__name__
        return None


def admin_application(health: Health) -> web.Application:
    """`/health/live`, `/health/ready` and `/metrics`; never on the public port."""

    async def live(_request: web.Request) -> web.Response:
        return web.json_response({"status": "ok"})

    async def ready(_request: web.Request) -> web.Response:
        faults = await health.faults()
        return web.json_response(
            {"status": "unready" if faults else "ok", "faults": faults}, status=503 if faults else 200
        )

    async def exposition(_request: web.Request) -> web.Response:
        return web.Response(body=metrics.exposition(), headers={"Content-Type": metrics.CONTENT_TYPE_LATEST})

    app = web.Application()
    app.router.add_get("/health/live", live)
    app.router.add_get("/health/ready", ready)
    app.router.add_get("/metrics", exposition)
    return app
