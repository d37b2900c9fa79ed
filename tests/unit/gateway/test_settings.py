import pytest

from services.gateway.settings import Settings
from services.gateway.upstreams import UPSTREAMS, RouteClass
from shared.limits import Limit
from shared.settings import SettingsError, load

ENVIRONMENT = {f"UPSTREAM_{upstream.name.upper()}": "http://one:8000" for upstream in UPSTREAMS} | {
    "JWKS_URL": "http://users/.well-known/jwks.json",
    "UPSTREAM_USERS": "http://users:8001",
    "UPSTREAM_MEDIA": "http://media-1:8002, http://media-2:8002",
}


def test_instances_are_found_by_the_names_in_the_table() -> None:
    settings = load(Settings, "gateway", {**ENVIRONMENT, "GATEWAY_UPSTREAM_USERS": "http://mine"})
    assert settings.upstream["media"] == ("http://media-1:8002", "http://media-2:8002")
    assert settings.upstream["users"] == ("http://mine",)
    assert settings.limits()[RouteClass.CREDENTIALS] == Limit(20, 60)


def test_a_missing_service_and_a_wrong_limit_are_named() -> None:
    with pytest.raises(SettingsError) as missing:
        load(Settings, "gateway", {**ENVIRONMENT, "UPSTREAM_MEDIA": ""})
    assert missing.value.lines == ["UPSTREAM_MEDIA: missing"]
    with pytest.raises(SettingsError) as wrong:
        load(Settings, "gateway", {**ENVIRONMENT, "LIMIT_DEFAULT": "fast", "JWKS_URL": ""})
    assert [line.partition(":")[0] for line in wrong.value.lines] == ["JWKS_URL", "LIMIT_DEFAULT"]
    with pytest.raises(SettingsError) as scheme:
        load(Settings, "gateway", {**ENVIRONMENT, "UPSTREAM_USERS": "users:8001"})
    assert scheme.value.lines[0].startswith("UPSTREAM_USERS: takes")
