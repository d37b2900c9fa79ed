import pytest

from services.gateway.upstreams import UPSTREAMS, RouteClass, rule_for, rules_under
from shared.application import Access

PREFIXES = [prefix for upstream in UPSTREAMS for prefix in upstream.prefixes]


def test_no_prefix_is_claimed_twice() -> None:
    assert len(PREFIXES) == len(set(PREFIXES))
    assert not [(a, b) for a in PREFIXES for b in PREFIXES if a != b and b.startswith(a + "/")]


@pytest.mark.parametrize(
    ("method", "path", "access", "route_class"),
    [
        ("POST", "/api/v1/users", Access.PUBLIC, RouteClass.CREDENTIALS),
        ("GET", "/api/v1/users/me", Access.USER, RouteClass.DEFAULT),
        ("GET", "/api/v1/users/0190", Access.OPTIONAL, RouteClass.DEFAULT),
        ("DELETE", "/api/v1/users/0190", Access.USER, RouteClass.DEFAULT),
        ("PUT", "/api/v1/users/me/password", Access.USER, RouteClass.CREDENTIALS),
        ("POST", "/api/v1/sessions", Access.PUBLIC, RouteClass.CREDENTIALS),
        ("POST", "/api/v1/sessions/refresh", Access.PUBLIC, RouteClass.DEFAULT),
        ("DELETE", "/api/v1/sessions", Access.USER, RouteClass.DEFAULT),
        ("POST", "/api/v1/password-resets", Access.PUBLIC, RouteClass.CREDENTIALS),
        ("PUT", "/api/v1/password-resets/token", Access.PUBLIC, RouteClass.CREDENTIALS),
        ("GET", "/api/v1/admin/users", Access.USER, RouteClass.DEFAULT),
        ("POST", "/api/v1/media", Access.USER, RouteClass.UPLOAD),
        ("GET", "/api/v1/media", Access.USER, RouteClass.DEFAULT),
        ("GET", "/api/v1/media/usage", Access.USER, RouteClass.DEFAULT),
        ("HEAD", "/api/v1/media/1/variants/small", Access.OPTIONAL, RouteClass.DEFAULT),
        ("GET", "/api/v1/media/1/original", Access.OPTIONAL, RouteClass.DEFAULT),
        ("GET", "/api/v1/media/1/anything", Access.USER, RouteClass.DEFAULT),
        ("POST", "/api/v1/unsubscribe/token", Access.PUBLIC, RouteClass.DEFAULT),
        ("GET", "/.well-known/jwks.json", Access.PUBLIC, RouteClass.DEFAULT),
        ("GET", "/api/v1/notifications/stream", Access.USER, RouteClass.DEFAULT),
        ("BREW", "/api/v1/webhooks", Access.USER, RouteClass.DEFAULT),
    ],
)
def test_who_may_ask_and_what_it_counts_as(method: str, path: str, access: Access, route_class: RouteClass) -> None:
    prefix = next(prefix for prefix in PREFIXES if path == prefix or path.startswith(prefix + "/"))
    rule = rule_for(rules_under(prefix), method, path)
    assert (rule.access, rule.route_class) == (access, route_class)
