"""How often whom: rate limits by user, else by address, for each class of routes.

Headers as in draft-ietf-httpapi-ratelimit-headers-10: `RateLimit-Policy: "default";q=200;w=4` and
`RateLimit: "default";r=199;t=1` (remaining requests, seconds until all of them are free again).
"""

import ipaddress
import math
from collections.abc import Mapping
from functools import lru_cache
from typing import NamedTuple

from services.gateway.upstreams import RouteClass
from shared.auth import Principal
from shared.errors import RateLimited
from shared.limits import Decision, Limit, RateLimiter


def parse_limit(text: str) -> Limit:
    """`20/60`: twenty requests in sixty seconds."""
    requests, _, seconds = text.partition("/")
    return Limit(int(requests), float(seconds))


class _Class(NamedTuple):
    """What is known of a class of routes before any request."""

    name: str
    limit: Limit
    by_user: bool
    policy: str


class Standing(NamedTuple):
    """Where a caller stands after a request."""

    name: str
    policy: str
    decision: Decision

    def headers(self) -> dict[str, str]:
        return {"RateLimit-Policy": self.policy, "RateLimit": self._left()}

    def lines(self) -> bytes:
        """The same as lines."""
        return f"RateLimit-Policy: {self.policy}\r\nRateLimit: {self._left()}\r\n".encode()

    def _left(self) -> str:
        return f'"{self.name}";r={self.decision.remaining};t={math.ceil(self.decision.reset)}'


class Limits:
    def __init__(self, limiter: RateLimiter, limits: Mapping[RouteClass, Limit]) -> None:
        self._limiter = limiter
        self._classes = {
            route_class: _Class(
                route_class.value,
                limit,
                # Whoever guesses passwords does not get a new allowance with each account it takes over.
                route_class is not RouteClass.CREDENTIALS,
                f'"{route_class}";q={limit.requests};w={limit.seconds:g}',
            )
            for route_class, limit in limits.items()
        }

    async def hit(self, route_class: RouteClass, principal: Principal | None, address: str) -> Standing:
        """Count a request. Raises `RateLimited` (with the headers of `Standing`)."""
        name, limit, by_user, policy = self._classes[route_class]
        if by_user and principal is not None:
            key = f"{name}:user:{principal.user_id.hex}"
        else:
            key = f"{name}:address:{_network(address)}"
        decision = await self._limiter.hit(key, limit)
        standing = Standing(name, policy, decision)
        if not decision.allowed:
            refusal = RateLimited(math.ceil(decision.retry_after))
            refusal.headers.update(standing.headers())
            raise refusal
        return standing


@lru_cache(maxsize=4096)
def _network(address: str) -> str:
    """IPv6 callers own a /64 and can change their address in it at will."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return "unknown"
    if parsed.version == 4:
        return address
    if parsed.ipv4_mapped:
        return str(parsed.ipv4_mapped)
    return str(ipaddress.ip_network(f"{parsed}/64", strict=False).network_address)
