"""What the environment says to the gateway."""

from collections.abc import Mapping
from typing import Annotated

import msgspec

from services.gateway.limits import parse_limit
from services.gateway.upstreams import UPSTREAMS, RouteClass
from shared.limits import Limit
from shared.settings import Count, ProcessSettings

RateText = Annotated[str, msgspec.Meta(pattern=r"^[1-9]\d{0,8}/[1-9]\d{0,6}$", description="requests/seconds: 20/60")]


class Settings(ProcessSettings, frozen=True, kw_only=True):
    port: int = 8080
    jwks_url: str
    # UPSTREAM_USERS, UPSTREAM_MEDIA, ...: by the names in `upstreams.py`; dns+http:// is every address of a name
    upstream: Mapping[str, tuple[str, ...]] = msgspec.field(default_factory=dict)
    upstream_max_connections: Count = 1000  # to one instance; and requests under way to one service
    upload_max_bytes: Count = 64 * 1024 * 1024
    idle_seconds: Annotated[float, msgspec.Meta(gt=0)] = 60.0  # without a byte from the client or the service
    # All of the requests may come at once, so 200/4 is a burst of 200 and 50 a second in the long run.
    limit_default: RateText = "200/4"
    limit_credentials: RateText = "20/60"
    limit_upload: RateText = "60/60"
    gateway_instances: Count = 1  # how many share the limits: each keeps its part while Redis is away
    trusted_proxies: Annotated[int, msgspec.Meta(ge=0)] = 0  # how many entries of X-Forwarded-For are our own proxies'
    cors_origins: tuple[str, ...] = ()

    def check(self) -> list[str]:
        faults = [f"UPSTREAM_{u.name.upper()}: missing" for u in UPSTREAMS if not self.upstream.get(u.name)]
        for name, urls in self.upstream.items():
            if any(not url.startswith(("http://", "https://", "dns+http://")) for url in urls):
                faults.append(
                    f"UPSTREAM_{name.upper()}: takes a comma list of http://, https:// or dns+http:// addresses"
                )
        return faults

    def limits(self) -> dict[RouteClass, Limit]:
        return {
            RouteClass.DEFAULT: parse_limit(self.limit_default),
            RouteClass.CREDENTIALS: parse_limit(self.limit_credentials),
            RouteClass.UPLOAD: parse_limit(self.limit_upload),
        }
