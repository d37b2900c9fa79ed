"""Configuration from the environment, read once at start into a frozen class.

A variable is the field's name in capitals. One prefixed with the service's name wins (`USERS_DATABASE_URL` before
`DATABASE_URL`), so one environment can configure every service of a machine. A field that is a mapping is every
variable that begins with its name (`UPSTREAM_USERS` is `upstream["users"]`). Everything that is missing or wrong is
reported at once, a line a variable.
"""

import os
import types
import typing
from collections.abc import Mapping
from typing import Annotated, Literal, TypeVar

import msgspec

S = TypeVar("S", bound="ProcessSettings")

Secret = Annotated[str, msgspec.Meta(min_length=32, description="a secret of at least 32 characters")]
Port = Annotated[int, msgspec.Meta(ge=0, le=65535)]
Seconds = Annotated[float, msgspec.Meta(ge=0)]
Timeout = Annotated[float, msgspec.Meta(gt=0)]
Count = Annotated[int, msgspec.Meta(ge=1)]


class SettingsError(Exception):
    """`lines` names each variable that is missing or wrong, and why."""

    def __init__(self, lines: list[str]) -> None:
        super().__init__("\n".join(lines))
        self.lines = lines


class ProcessSettings(msgspec.Struct, frozen=True, kw_only=True):
    """What every process has. Times are in seconds."""

    host: str = "127.0.0.1"
    port: Port = 8000
    admin_port: Port = 9000
    reuse_port: bool = False
    workers: Count = 1  # processes that share the port; each takes the next ADMIN_PORT
    drain_seconds: Seconds = 5.0
    shutdown_seconds: Seconds = 20.0
    request_timeout_seconds: Seconds = 30.0
    max_body_bytes: Count = 64 * 1024
    max_concurrent_requests: Count = 500  # the cap of a limit that adapts
    max_connections: Count = 10_000  # to one port
    head_seconds: Timeout = 10.0  # for the head of a request
    stall_seconds: Timeout = 30.0  # without progress of a body, or of an answer being taken
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    otel_exporter_otlp_endpoint: str | None = None
    otel_sample_ratio: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.1
    redis_url: str | None = None


class DataSettings(ProcessSettings, frozen=True, kw_only=True):
    """What a service with a database and events has besides."""

    database_url: str
    database_replica_urls: tuple[str, ...] = ()
    database_pool_max: Count = 10
    # How many pools like this one share the server at most: one a process and service, and those a rollout adds.
    database_pools: Count = 1
    database_reserve: Annotated[int, msgspec.Meta(ge=0)] = 10
    database_acquire_seconds: Seconds = 2.0
    database_statement_seconds: Seconds = 5.0
    database_pgbouncer: bool = False
    database_replica_max_lag_seconds: Seconds = 5.0
    bus: Literal["kafka", "inline"] = "kafka"
    kafka_bootstrap: tuple[str, ...] = ()
    kafka_idempotence: bool = True
    kafka_session_timeout_seconds: Annotated[float, msgspec.Meta(ge=1)] = 45.0
    # The client hangs without a word when the broker refuses other characters.
    kafka_instance_id: Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9._-]{1,200}$")] | None = None
    kafka_partitions: Count = 6
    kafka_replication: Count = 1
    kafka_stall_seconds: Annotated[float, msgspec.Meta(gt=0)] = 60.0
    event_retry_delays_seconds: tuple[Seconds, ...] = (10.0, 60.0, 600.0)
    event_handler_seconds: Timeout = 120.0

    def check(self) -> list[str]:
        if self.bus == "kafka" and not self.kafka_bootstrap:
            return ["KAFKA_BOOTSTRAP: missing (needed when BUS=kafka)"]
        return []


def load(cls: type[S], service: str, environ: Mapping[str, str] = os.environ) -> S:
    """Read `cls` from `environ` for `service`. Raises `SettingsError` with every fault found."""
    values: dict[str, object] = {}
    faults: list[str] = []
    hints = typing.get_type_hints(cls, include_extras=True)
    for field in msgspec.structs.fields(cls):
        name = field.name.upper()
        if typing.get_origin(hints[field.name]) is Mapping:
            values[field.name] = _mapping(name, service, environ, hints[field.name])
            continue
        prefixed = f"{service.upper()}_{name}"
        variable = prefixed if environ.get(prefixed, "") else name
        raw = environ.get(variable, "")
        if not raw:
            if field.required:
                faults.append(f"{name}: missing")
            continue
        try:
            values[field.name] = _parse(raw, hints[field.name])
        except msgspec.ValidationError as error:
            # The value itself is not shown: it may be a secret.
            faults.append(f"{variable}: {str(error).removesuffix(' - at `$`')}")
    if faults:
        raise SettingsError(sorted(faults))
    settings = msgspec.convert(values, cls)
    if faults := getattr(settings, "check", list)():
        raise SettingsError(faults)
    return settings


def _mapping(name: str, service: str, environ: Mapping[str, str], hint: object) -> dict[str, object]:
    """Its values are texts or comma lists of texts, so none of them can be wrong."""
    _, value_hint = typing.get_args(hint)
    return {
        variable.removeprefix(prefix).lower(): _parse(raw, value_hint)
        for prefix in (f"{name}_", f"{service.upper()}_{name}_")
        for variable, raw in environ.items()
        if variable.startswith(prefix) and raw
    }


def _parse(raw: str, hint: object) -> object:
    if typing.get_origin(hint) is tuple:
        return msgspec.convert([part.strip() for part in raw.split(",") if part.strip()], hint, strict=False)
    if isinstance(hint, types.UnionType) and str in typing.get_args(hint):
        return raw
    return msgspec.convert(raw, hint, strict=False)
