"""The shapes of the gateway's own answers."""

from typing import Any

import msgspec


class Home(msgspec.Struct, frozen=True):
    """What a start page shows. A part whose service is down is empty and named in `degraded`."""

    user: dict[str, Any] | None
    recent_media: list[dict[str, Any]]
    unread: int | None
    degraded: list[str]


class Index(msgspec.Struct, frozen=True):
    name: str
    version: str
    links: dict[str, str]
