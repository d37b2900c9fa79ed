"""Webhooks over HTTP by the Standard Webhooks specification (https://www.standardwebhooks.com): one signed attempt.

People choose the URLs, so no connection may lead into a private network. What counts is the address that is connected
to, checked for every connection as its socket is made: names that resolve to another address the second time, addresses
written as literals, and IPv6 forms that hold an IPv4 address are all caught there. Redirects are not followed.
"""

import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import datetime
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Any

import aiohttp
import msgspec
from standardwebhooks import Webhook as Signer

Network = IPv4Network | IPv6Network

_NAT64 = ip_network("64:ff9b::/96")
# What `ipaddress` calls global, but leads into networks of one's own: local NAT64 (RFC 8215), site-local, and the
# IPv4-compatible and IPv4-translated forms.
_NOT_PUBLIC = tuple(ip_network(text) for text in ("64:ff9b:1::/48", "fec0::/10", "::/96", "::ffff:0:0:0/96"))
_IPV4_BITS = 0xFFFFFFFF
_READ_BYTES = 4096
_GONE = 410


class PrivateAddress(OSError):
    """The URL leads to an address that is not public."""


class Attempt(msgspec.Struct, frozen=True):
    """What became of one attempt; `status` is `None` when there was no answer."""

    status: int | None
    error: str = ""

    @property
    def delivered(self) -> bool:
        return self.status is not None and 200 <= self.status < 300

    @property
    def gone(self) -> bool:
        """The receiver asks never to be called again."""
        return self.status == _GONE


def is_public(text: str, allowed: Sequence[Network] = ()) -> bool:
    """Whether an address may be connected to: public, or in one of the `allowed` networks."""
    address = _innermost(ip_address(text.partition("%")[0]))
    if any(address in network for network in allowed):
        return True
    return address.is_global and not address.is_multicast and not any(address in network for network in _NOT_PUBLIC)


def _innermost(address: IPv4Address | IPv6Address) -> IPv4Address | IPv6Address:
    """The IPv4 address that a translating network would connect to in the end."""
    if isinstance(address, IPv6Address):
        inner = address.ipv4_mapped or address.sixtofour or (address.teredo[1] if address.teredo else None)
        if inner is None and address in _NAT64:
            inner = IPv4Address(int(address) & _IPV4_BITS)
        return inner or address
    return address


class WebhookClient:
    def __init__(self, http: aiohttp.ClientSession) -> None:
        self._http = http

    @classmethod
    @asynccontextmanager
    async def opened(cls, timeout_seconds: float, allowed: Sequence[Network]) -> "AsyncIterator[WebhookClient]":
        def guarded(info: Any) -> socket.socket:
            family, kind, protocol, _, sockaddr = info
            if not is_public(str(sockaddr[0]), allowed):
                raise PrivateAddress("the URL leads into a private network")
            return socket.socket(family, kind, protocol)

        connector = aiohttp.TCPConnector(socket_factory=guarded, use_dns_cache=False, force_close=True, limit=100)
        timeout = aiohttp.ClientTimeout(total=timeout_seconds)
        async with aiohttp.ClientSession(
            connector=connector, timeout=timeout, cookie_jar=aiohttp.DummyCookieJar(), trust_env=False
        ) as http:
            yield cls(http)

    async def post(self, url: str, secret: str, message_id: str, now: datetime, payload: str) -> Attempt:
        """One attempt, bounded; whatever goes wrong is part of the result. At most 4 KiB of the answer are read."""
        headers = {
            "Content-Type": "application/json",
            "User-Agent": "Tenfold-Webhooks/1",
            "webhook-id": message_id,
            "webhook-timestamp": str(int(now.timestamp())),
            "webhook-signature": Signer(secret).sign(message_id, now, payload),
        }
        try:
            async with self._http.post(url, data=payload.encode(), headers=headers, allow_redirects=False) as response:
                await response.content.read(_READ_BYTES)
                return Attempt(response.status, "" if response.ok and response.status < 300 else "not a 2xx status")
        except TimeoutError:
            return Attempt(None, "no answer in time")
        except (aiohttp.ClientError, OSError, ValueError) as error:
            cause = getattr(error, "os_error", error)
            return Attempt(None, str(cause) if isinstance(cause, PrivateAddress) else type(error).__name__)
