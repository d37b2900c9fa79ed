"""Where the instances of a service are: a list of base URLs, or names that are looked up again and again.

`http://10.0.0.7:8000` is one instance. `dns+http://users:8000` is as many as `users` has addresses, as the name of a
headless Service in Kubernetes has: looked up every five seconds, so that instances come and go by themselves.
"""

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Generic, Protocol, TypeVar
from urllib.parse import urlsplit

from shared.logs import get_logger
from shared.resilience.instances import Instance, Instances

log = get_logger()

_EVERY_SECONDS = 5.0
_LOOKUP_SECONDS = 2.0
_SCHEME = "dns+"


class Retirable(Instance, Protocol):
    def retire(self) -> None:
        """It is no instance any more: finish what is under way, keep nothing beyond it."""
        ...

    def close(self) -> None:
        """Cut what is under way, too."""
        ...


M = TypeVar("M", bound=Retirable)
Lookup = Callable[[str], Awaitable[Sequence[str]]]


async def addresses(host: str) -> list[str]:
    """The IP addresses of `host` as this system resolves it. Raises `OSError`."""
    found = await asyncio.get_running_loop().getaddrinfo(host, None, type=socket.SOCK_STREAM)
    return sorted({str(address[0]) for *_, address in found})


class Follower(Generic[M]):
    """Keeps `instances` to those that `urls` name."""

    def __init__(
        self, urls: Sequence[str], instances: Instances[M], make: Callable[[str], M], lookup: Lookup = addresses
    ) -> None:
        self._fixed = {url.rstrip("/") for url in urls if not url.startswith(_SCHEME)}
        # By name, the last answer: an instance stays as long as nobody says that it is gone.
        self._named: dict[str, set[str]] = {
            url.removeprefix(_SCHEME).rstrip("/"): set() for url in urls if url.startswith(_SCHEME)
        }
        self._instances = instances
        self._make = make
        self._lookup = lookup
        self._members: dict[str, M] = {}
        self._apply()

    @asynccontextmanager
    async def following(self) -> AsyncIterator[None]:
        """Look up while open; all instances are closed at the end."""
        task = None
        try:
            if self._named:
                await self.look()
                task = asyncio.create_task(self._follow(), name="discovery")
            yield
        finally:
            if task is not None:
                task.cancel()
                with suppress(asyncio.CancelledError):
                    await task
            for member in self._members.values():
                member.close()

    async def look(self) -> None:
        """Ask for all names once."""
        for url in self._named:
            parts = urlsplit(url)
            try:
                async with asyncio.timeout(_LOOKUP_SECONDS):
                    found = await self._lookup(parts.hostname or "")
            except Exception as error:  # noqa: BLE001 - whatever it is, who is known stays so
                log.warning("lookup_failed", host=parts.hostname, error=repr(error))
                continue
            if found:
                self._named[url] = {_with_address(url, address) for address in found}
        self._apply()

    async def _follow(self) -> None:
        while True:
            await asyncio.sleep(_EVERY_SECONDS)
            await self.look()

    def _apply(self) -> None:
        wanted = self._fixed.union(*self._named.values())
        for url in self._members.keys() - wanted:
            member = self._members.pop(url)
            self._instances.remove(member)
            member.retire()
        for url in sorted(wanted - self._members.keys()):
            self._members[url] = member = self._make(url)
            self._instances.add(member)


def _with_address(url: str, address: str) -> str:
    parts = urlsplit(url)
    host = f"[{address}]" if ":" in address else address
    return parts._replace(netloc=host if parts.port is None else f"{host}:{parts.port}").geturl()
