"""Which service answers what, who may ask, and how often. Adding a service is one line in `UPSTREAMS`.

The instances of a service come from the environment: `UPSTREAM_<NAME>`, a comma list of base URLs. What is not said in
`RULES` needs a token and counts as an ordinary request, so a forgotten line closes a door instead of opening one.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property

from shared.application import Access


class RouteClass(StrEnum):
    """What a request counts as: each class has its own rate limit, and uploads their own size."""

    DEFAULT = "default"
    CREDENTIALS = "credentials"
    UPLOAD = "upload"


@dataclass(frozen=True)
class Upstream:
    name: str
    prefixes: tuple[str, ...]


@dataclass(frozen=True)
class Rule:
    """`path` may hold `*` for one segment and end in `/**` for whatever follows; `methods` may be `*`."""

    methods: str
    path: str
    access: Access = Access.USER
    route_class: RouteClass = RouteClass.DEFAULT

    def matches(self, method: str, path: str) -> bool:
        return (self.methods == "*" or method in self._methods) and self._pattern.fullmatch(path) is not None

    @cached_property
    def _methods(self) -> frozenset[str]:
        return frozenset(self.methods.split())

    @cached_property
    def _pattern(self) -> "re.Pattern[str]":
        return re.compile(re.escape(self.path).replace(r"/\*\*", "(/.*)?").replace(r"\*", "[^/]+"))


UPSTREAMS: tuple[Upstream, ...] = (
    Upstream(
        "users",
        (
            "/api/v1/users",
            "/api/v1/sessions",
            "/api/v1/email-verifications",
            "/api/v1/password-resets",
            "/api/v1/admin/users",
            "/.well-known/jwks.json",
        ),
    ),
    Upstream("media", ("/api/v1/media",)),
    Upstream(
        "notifier",
        (
            "/api/v1/notifications",
            "/api/v1/notification-preferences",
            "/api/v1/webhooks",
            "/api/v1/campaigns",
            "/api/v1/unsubscribe",
        ),
    ),
)

# The first that matches counts. OPTIONAL: the service decides, for instance by a signature in the URL.
RULES: tuple[Rule, ...] = (
    Rule("POST", "/api/v1/users", Access.PUBLIC, RouteClass.CREDENTIALS),
    Rule("GET HEAD", "/api/v1/users/me"),
    Rule("GET HEAD", "/api/v1/users/*", Access.OPTIONAL),
    Rule("PUT", "/api/v1/users/me/password", Access.USER, RouteClass.CREDENTIALS),
    Rule("POST", "/api/v1/sessions", Access.PUBLIC, RouteClass.CREDENTIALS),
    Rule("POST", "/api/v1/sessions/refresh", Access.PUBLIC),
    Rule("*", "/api/v1/email-verifications/**", Access.OPTIONAL, RouteClass.CREDENTIALS),
    Rule("*", "/api/v1/password-resets/**", Access.PUBLIC, RouteClass.CREDENTIALS),
    Rule("*", "/.well-known/jwks.json", Access.PUBLIC),
    Rule("POST", "/api/v1/media", Access.USER, RouteClass.UPLOAD),
    Rule("POST", "/api/v1/media/uploads/**", Access.USER, RouteClass.UPLOAD),
    Rule("PUT", "/api/v1/media/uploads/**", Access.OPTIONAL, RouteClass.UPLOAD),
    Rule("GET HEAD", "/api/v1/media/usage"),
    Rule("GET HEAD", "/api/v1/media/*", Access.OPTIONAL),
    Rule("GET HEAD", "/api/v1/media/*/original", Access.OPTIONAL),
    Rule("GET HEAD", "/api/v1/media/*/variants/*", Access.OPTIONAL),
    Rule("*", "/api/v1/unsubscribe/*", Access.PUBLIC),
)

_CLOSED = Rule("*", "/**")


def rules_under(prefix: str, rules: Iterable[Rule] = RULES) -> tuple[Rule, ...]:
    """The rules that can match a path under `prefix`, so that a request looks at a few of them only."""
    return tuple(rule for rule in rules if (rule.path.removesuffix("/**") + "/").startswith(prefix + "/"))


def rule_for(rules: Iterable[Rule], method: str, path: str) -> Rule:
    """`path` as a router sees it, decoded: `/api/v1/sess%69ons` is limited like what it stands for."""
    return next((rule for rule in rules if rule.matches(method, path)), _CLOSED)
