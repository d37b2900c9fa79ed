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


class Limits:
    def __init__(self, limiter: RateLimiter, limits: Mapping[RouteClass, Limit]) -> None:
        self._limiter = limiter
        self._limits = limits
        self._policies = {name: f'"{name}";q={limit.requests};w={limit.seconds:g}' for name, limit in limits.items()}

    async def hit(self, route_class: RouteClass, principal: Principal | None, address: str) -> "Standing":
        """Count a request. Raises `RateLimited` (with the headers of `Standing`)."""
        # Whoever guesses passwords does not get a new allowance with each account it takes over.
        by_user = principal is not None and route_class is not RouteClass.CREDENTIALS
        caller = f"user:{principal.user_id.hex}" if by_user and principal else f"address:{_network(address)}"
        decision = await self._limiter.hit(f"{route_class}:{caller}", self._limits[route_class])
        standing = Standing(route_class, self._policies[route_class], decision)
        if not decision.allowed:
            refusal = RateLimited(math.ceil(decision.retry_after))
            refusal.headers.update(standing.headers())
            raise refusal
        return standing


class Standing(NamedTuple):
    """Where a caller stands after a request."""

    route_class: RouteClass
    policy: str
    decision: Decision

    def headers(self) -> dict[str, str]:
        return {"RateLimit-Policy": self.policy, "RateLimit": self._left()}

    def lines(self) -> bytes:
        """The same as lines."""
        return f"RateLimit-Policy: {self.policy}\r\nRateLimit: {self._left()}\r\n".encode()

    def _left(self) -> str:
        return f'"{self.route_class}";r={self.decision.remaining};t={math.ceil(self.decision.reset)}'


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
