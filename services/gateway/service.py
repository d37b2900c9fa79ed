"""What the gateway puts together itself."""

import asyncio
from collections.abc import Mapping
from typing import Any, TypeVar

import msgspec

from services.gateway.schemas import Home
from shared.errors import DeadlineExceeded, Unavailable
from shared.http_client import ServiceClient

T = TypeVar("T")

_PART_SECONDS = 2.0
_RECENT = 6


class _MediaList(msgspec.Struct):
    items: list[dict[str, Any]]


class _Inbox(msgspec.Struct):
    unread: int


class Gateway:
    def __init__(self, clients: Mapping[str, ServiceClient]) -> None:
        """`clients` by the services' names."""
        self._clients = clients

    async def home(self, headers: Mapping[str, str]) -> Home:
        """Asks all services at once, in the caller's name: `headers` carry its token."""
        degraded: list[str] = []

        async def part(service: str, path: str, type_: type[T]) -> T | None:
            try:
                return await self._clients[service].get(path, type_, headers=dict(headers), timeout=_PART_SECONDS)
            except (Unavailable, DeadlineExceeded):
                degraded.append(service)
                return None

        user, media, inbox = await asyncio.gather(
            part("users", "/api/v1/users/me", dict[str, Any]),
            part("media", f"/api/v1/media?limit={_RECENT}", _MediaList),
            part("notifier", "/api/v1/notifications?limit=1", _Inbox),
        )
        return Home(user, media.items if media else [], inbox.unread if inbox else None, sorted(degraded))
