"""How often whom: rate limits by user, else by address, for each class of routes.

Headers as in draft-ietf-httpapi-ratelimit-headers-10: `RateLimit-Policy: "default";q=200;w=4` and
`RateLimit: "default";r=199;t=1` (remaining requests, seconds until all of them are free again).
"""

import ipaddress
import math
from collections.abc import Mapping

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

    async def hit(self, route_class: RouteClass, principal: Principal | None, address: str) -> dict[str, str]:
        """Count a request; the headers of its answer. Raises `RateLimited` (with the same headers)."""
        # Whoever guesses passwords does not get a new allowance with each account it takes over.
        by_user = principal is not None and route_class is not RouteClass.CREDENTIALS
        caller = f"user:{principal.user_id}" if by_user and principal else f"address:{_network(address)}"
        decision = await self._limiter.hit(f"{route_class}:{caller}", self._limits[route_class])
        headers = self._headers(route_class, decision)
        if not decision.allowed:
            refusal = RateLimited(math.ceil(decision.retry_after))
            refusal.headers.update(headers)
            raise refusal
        return headers

    def _headers(self, route_class: RouteClass, decision: Decision) -> dict[str, str]:
        return {
            "RateLimit-Policy": self._policies[route_class],
            "RateLimit": f'"{route_class}";r={decision.remaining};t={math.ceil(decision.reset)}',
        }


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
