"""How often whom: rate limits by user, else by address, for each class of routes.

Headers as in draft-ietf-httpapi-ratelimit-headers-10: `RateLimit-Policy: "default";q=200;w=4` and
`RateLimit: "default";r=199;t=1` (remaining requests, seconds until all of them are free again).
"""

import ipaddress
import math
from collections.abc import Callable, Mapping
from functools import lru_cache

import msgspec

from services.gateway.upstreams import RouteClass
from shared.auth import Principal
from shared.errors import RateLimited
from shared.limits import Decision, Limit, RateLimiter


def parse_limit(text: str) -> Limit:
    """`20/60`: twenty requests in sixty seconds."""
    requests, _, seconds = text.partition("/")
    return Limit(int(requests), float(seconds))


class _Class(msgspec.Struct, frozen=True, eq=False):
    """What is known of a class of routes before any request."""

    name: str
    limit: Limit
    by_user: bool
    policy: str
    lines: bytes  # of a standing, but for its two numbers


class Standing(msgspec.Struct, frozen=True, gc=False):
    """Where a caller stands after a request."""

    of: _Class
    decision: Decision

    def check(self) -> None:
        """Raises `RateLimited` when the request is one too many."""
        if not self.decision.allowed:
            refusal = RateLimited(self.decision.retry_after)
            refusal.headers.update(self.headers())
            raise refusal

    def headers(self) -> dict[str, str]:
        left = f'"{self.of.name}";r={self.decision.remaining};t={math.ceil(self.decision.reset)}'
        return {"RateLimit-Policy": self.of.policy, "RateLimit": left}

    def lines(self) -> bytes:
        """The same as lines."""
        return self.of.lines % (self.decision.remaining, math.ceil(self.decision.reset))


class Limits:
    def __init__(self, limiter: RateLimiter, limits: Mapping[RouteClass, Limit]) -> None:
        self._limiter = limiter
        self._classes = {route_class: _class(route_class, limit) for route_class, limit in limits.items()}

    async def hit(self, route_class: RouteClass, principal: Principal | None, address: str) -> Standing:
        """Count a request. Raises `RateLimited` (with the headers of `Standing`)."""
        of, key = self._key(route_class, principal, address)
        standing = Standing(of, await self._limiter.hit(key, of.limit))
        standing.check()
        return standing

    def ask(
        self, route_class: RouteClass, principal: Principal | None, address: str, tell: Callable[[Standing], None]
    ) -> None:
        """The same without a task: `tell`, which must not raise, is called now or later; it checks by itself."""
        of, key = self._key(route_class, principal, address)
        self._limiter.ask(key, of.limit, lambda decision: tell(Standing(of, decision)))

    def _key(self, route_class: RouteClass, principal: Principal | None, address: str) -> tuple[_Class, str]:
        of = self._classes[route_class]
        if of.by_user and principal is not None:
            return of, f"{of.name}:user:{principal.user_id.int:x}"
        return of, f"{of.name}:address:{_network(address)}"


def _class(route_class: RouteClass, limit: Limit) -> _Class:
    name, policy = route_class.value, f'"{route_class}";q={limit.requests};w={limit.seconds:g}'
    lines = f'RateLimit-Policy: {policy}\r\nRateLimit: "{name}";r=%d;t=%d\r\n'.encode()
    # Whoever guesses passwords does not get a new allowance with each account it takes over.
    return _Class(name, limit, route_class is not RouteClass.CREDENTIALS, policy, lines)


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
