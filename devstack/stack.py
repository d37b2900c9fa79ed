"""The whole stack as one context manager: servers, roles, migrations, services, and what tells others where they are.

Order: broker, Redis, mail and PostgreSQL (primary, then replicas and roles) in parallel; then migrations; then the
services. Stopped in reverse. `root` holds `data/`, `logs/`, `lock` and, while all is ready, `urls.json`.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import secrets
import shutil
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import aiohttp

from devstack import kafka, postgres
from devstack.pgbouncer import PgBouncer
from devstack.ports import free_port, free_ports
from devstack.redis import Redis
from devstack.services import GATEWAY, SERVICES, WITH_DATABASE
from devstack.supervisor import HERE, Child, ChildError, Report, Spec, StackError, Supervisor, run
from devstack.topology import Topology

REPOSITORY = HERE.parent
_SECRET_NAMES = ("postgres_admin", "postgres_replication", "users_signing_key", "link", "media_url", *WITH_DATABASE)
_STOP_SECONDS = 5.0


@dataclass(frozen=True, kw_only=True)
class Urls:
    """Where everything is. The PostgreSQL ones are the superuser's; `Stack.database_url` has those of a service."""

    gateway: str | None
    mail: str
    smtp: str
    postgres_primary: str
    postgres_replicas: tuple[str, ...]
    redis: str | None
    kafka: str | None
    admin: Mapping[str, tuple[str, ...]]

    def as_json(self) -> dict[str, object]:
        """The contents of `urls.json`."""
        return {
            "gateway": self.gateway, "mail": self.mail, "postgres_primary": self.postgres_primary,
            "postgres_replicas": list(self.postgres_replicas), "redis": self.redis, "kafka": self.kafka,
            "admin": {name: list(urls) for name, urls in self.admin.items()},
        }  # fmt: skip


@dataclass(frozen=True)
class _Service:
    """One process of services: its name, module, arguments, ports and the services whose admin port it has."""

    name: str
    command: tuple[str, ...]
    env: dict[str, str]
    admin_port: int
    services: tuple[str, ...]


class Stack:
    """`async with Stack(Topology.stage(4), root=Path(".devstack")) as stack`: all is ready inside.

    `durable=False` trades safety against a power cut for speed (tests). `keep_data=False` removes the data at the end.
    `report` gets one line a step for people. Raises `StackError` when anything fails to start.

    A server that dies by itself is started again on its data if `durable`; else the stack has failed (so has it when
    it was a broker that keeps its data in memory): that is raised at the end; `check()` and `failure` tell it earlier.
    """

    def __init__(
        self,
        topology: Topology,
        *,
        root: Path,
        durable: bool = True,
        keep_data: bool = True,
        report: Report | None = None,
        env: Mapping[str, str] | None = None,
        gateway_port: int | None = None,
        mail_port: int | None = None,
    ) -> None:
        self.topology = topology
        self.root = root.absolute()
        self.timings: dict[str, float] = {}
        self.supervisor: Supervisor
        self.broker_kind: kafka.BrokerKind | None = None
        self._durable = durable
        self._keep_data = keep_data
        self._report: Report = report or (lambda _line: None)
        self._extra_env = dict(env or {})
        self._preferred_gateway, self._preferred_mail = gateway_port, mail_port
        self._logs = self.root / "logs"
        self._data = self.root / "data"
        self._exits = contextlib.AsyncExitStack()
        self._urls: Urls | None = None
        self._secrets: dict[str, str] = {}
        self._services: list[_Service] = []

    @property
    def urls(self) -> Urls:
        if self._urls is None:
            raise StackError("the stack has not started")
        return self._urls

    @property
    def failure(self) -> asyncio.Future[None]:
        """Done, with a `ChildError`, when a server has died by itself."""
        return self.supervisor.failure

    def check(self) -> None:
        """Raise the `ChildError` of a server that has died by itself, if one has."""
        if self.failure.done():
            self.failure.result()

    def child(self, name: str) -> Child:
        """By name: postgres-primary, postgres-replica-0, redis, kafka, mail, users-api-0, media-worker-0, all-0."""
        try:
            return self.supervisor.children[name]
        except KeyError:
            known = ", ".join(self.supervisor.children)
            raise StackError(f"there is no {name} here, but {known}") from None

    def database_url(self, service: str) -> str:
        """The primary, as the service's own role."""
        return self._postgres.url(self._postgres.primary_port, service, self._secrets[service])

    def replica_urls(self, service: str) -> list[str]:
        return [self._postgres.url(port, service, self._secrets[service]) for port in self._postgres.replica_ports]

    def pooled_urls(self, user: str, password: str) -> tuple[str, tuple[str, ...]]:
        """The primary and the replicas through PgBouncer, as any role."""
        if self._pgbouncer is None:
            raise StackError("there is no PgBouncer in this topology")
        primary, *replicas = (self._pgbouncer.url(name, user, password) for name in ("primary", *self._replica_names()))
        return primary, tuple(replicas)

    async def promote(self) -> int:
        """Make a replica the primary, and the other replicas follow it; returns its index. `urls` stays as it was."""
        index = await self._postgres.promote()
        if self.topology.synchronous:
            await self._postgres.wait_for_replicas()
        return index

    @property
    def env(self) -> dict[str, str]:
        """The environment of the service processes, without what is each one's own."""
        return self._environment()

    async def __aenter__(self) -> Stack:
        try:
            await self._start()
        except BaseException:
            await self._exits.aclose()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._exits.aclose()
        if kind is None:
            self.check()

    def kill_now(self) -> None:
        """SIGKILL to everything, without waiting (the second Ctrl-C)."""
        if hasattr(self, "supervisor"):
            self.supervisor.kill_all()

    # --- start

    async def _start(self) -> None:
        self.root.mkdir(parents=True, exist_ok=True)
        self._exits.enter_context(_locked(self.root / "lock"))
        (self.root / "urls.json").unlink(missing_ok=True)
        self._logs.mkdir(exist_ok=True)
        self._data.mkdir(exist_ok=True)
        postgres.sweep_public_folders()
        self._secrets = _load_secrets(self._data / "secrets.json")
        self.supervisor = Supervisor(self._logs, self._report, respawn=self._durable)
        self.supervisor.open()
        self._exits.push_async_callback(self.supervisor.close)
        await self._start_backing()
        if self.topology.has_services:
            await self._start_services()
        else:
            self._urls = self._make_urls(None)
        self._exits.callback((self.root / "urls.json").unlink, missing_ok=True)
        _write_atomically(self.root / "urls.json", json.dumps(self.urls.as_json(), indent=2) + "\n")

    async def _start_backing(self) -> None:
        place = postgres.locate(self.root, self._report)
        if not self._keep_data:
            self._exits.callback(self._remove_data, place)
        self._postgres = postgres.Postgres(
            self.supervisor, place, logs=self._logs,
            passwords=(self._secrets["postgres_admin"], self._secrets["postgres_replication"]),
            replicas=self.topology.postgres_replicas, max_connections=self.topology.max_connections,
            durable=self._durable,
        )  # fmt: skip
        self._redis = (
            Redis(self.supervisor, self._data / "redis", durable=self._durable) if self.topology.redis else None
        )
        self._kafka: kafka.Kafka | None = None
        self._pgbouncer: PgBouncer | None = None
        self._exits.push_async_callback(self.supervisor.stop, ["postgres-primary"])
        replicas = [f"postgres-replica-{index}" for index in range(self.topology.postgres_replicas)]
        self._exits.push_async_callback(self.supervisor.stop, ["pgbouncer", "kafka", "redis", "mail", *replicas])
        parts = [self._start_postgres(), self._timed("mail sink", self._start_mail())]
        if self._redis:
            parts.append(self._timed("redis", self._redis.start()))
        if self.topology.broker != "none":
            parts.append(self._timed("kafka", self._start_broker()))
        await _all(*parts)

    async def _start_postgres(self) -> None:
        await self._timed("postgres primary", self._postgres.start_primary())
        await _all(
            self._timed("service roles", self._bootstrap()),
            *(
                self._timed(f"postgres replica {index}", self._postgres.start_replica(index))
                for index in range(self.topology.postgres_replicas)
            ),
        )
        if self.topology.synchronous:
            await self._postgres.wait_for_replicas()
        if self.topology.pgbouncer:
            ports = (self._postgres.primary_port, *self._postgres.replica_ports)
            self._pgbouncer = PgBouncer(
                self.supervisor, self._postgres.place, self._secrets["postgres_admin"],
                dict(zip(("primary", *self._replica_names()), ports, strict=True)),
            )  # fmt: skip
            await self._timed("pgbouncer", self._pgbouncer.start())

    def _replica_names(self) -> list[str]:
        return [f"replica-{index}" for index in range(self.topology.postgres_replicas)]

    def _remove_data(self, place: postgres.Place) -> None:
        postgres.remove_data(place)
        shutil.rmtree(self._data, ignore_errors=True)

    async def _start_broker(self) -> None:
        chosen = await asyncio.to_thread(kafka.plan, self.topology.broker)
        chosen = await kafka.fetch(chosen, self.topology.broker, self._logs, self._report)
        self.broker_kind = chosen.kind
        self._kafka = kafka.Kafka(self.supervisor, chosen, self._data / "kafka", self._logs)
        await self._kafka.start()

    async def _start_mail(self) -> None:
        for last in (False, True):
            self._smtp_port, self._mail_port = free_port(), free_port(self._preferred_mail)
            command = (sys.executable, "-m", "devstack.mail", "--smtp-port", str(self._smtp_port),
                       "--http-port", str(self._mail_port))  # fmt: skip
            ready = _http_ready(f"http://127.0.0.1:{self._mail_port}/stats")
            child = self.supervisor.add(Spec(name="mail", command=command, ready=ready, stop=_terminate(1.5)))
            try:
                await child.start()
            except ChildError as error:
                if last or "already in use" not in error.tail:
                    raise
            else:
                return

    async def _bootstrap(self) -> None:
        from shared.migrate import bootstrap

        await bootstrap(self._postgres.primary_url, {name: self._secrets[name] for name in WITH_DATABASE})

    async def _start_services(self) -> None:
        plan = self._plan_together if self.topology.one_process else self._plan_apart
        gateway, upstreams, self._services = plan()
        shared_env = self._environment(gateway, upstreams)
        await self._timed(
            "migrations",
            run(
                [sys.executable, "-m", "services", "migrate"],
                log=self._logs / "migrations.log", what="migrations", env=shared_env, cwd=REPOSITORY,
            ),
        )  # fmt: skip
        for service in self._services:
            self.supervisor.add(
                Spec(
                    name=service.name, command=(sys.executable, "-m", *service.command), env=shared_env | service.env,
                    ready=_http_ready(f"http://127.0.0.1:{service.admin_port}/health/ready"), cwd=REPOSITORY,
                    stop=_terminate(_STOP_SECONDS), respawn=True,
                )
            )  # fmt: skip
        self._exits.push_async_callback(self.supervisor.stop, [service.name for service in self._services])
        await _all(*(self._timed(s.name, self._start_service(self.child(s.name))) for s in self._services))
        self._urls = self._make_urls(gateway)

    async def _start_service(self, child: Child) -> None:
        try:
            await child.start()
        except ChildError as error:
            if "already in use" not in error.tail:
                raise
            await child.start()

    # --- the plan of the services

    def _plan_together(self) -> tuple[int, dict[str, list[int]], list[_Service]]:
        """All in one process; the processes share the gateway's port, the kernel spreads the connections."""
        gateway = free_port(self._preferred_gateway)
        names = tuple(service.name for service in SERVICES)
        behind = [name for name in names if name != GATEWAY]
        upstreams: dict[str, list[int]] = {name: [] for name in behind}
        services = []
        for index in range(self.topology.instances):
            admin, *ports = free_ports(1 + len(behind))
            env = {"ADMIN_PORT": str(admin), "GATEWAY_PORT": str(gateway)}
            for name, port in zip(behind, ports, strict=True):
                upstreams[name].append(port)
                env[f"{name.upper()}_PORT"] = str(port)
            if self.topology.instances > 1:
                env["REUSE_PORT"] = "true"
            services.append(_Service(f"all-{index}", ("services", "run"), env, admin, names))
        return gateway, upstreams, services

    def _plan_apart(self) -> tuple[int, dict[str, list[int]], list[_Service]]:
        gateway = free_port(self._preferred_gateway)
        upstreams: dict[str, list[int]] = {service.name: [] for service in SERVICES if service.name != GATEWAY}
        services = []
        for kind, count in self.topology.processes.items():
            service, _, role = kind.rpartition("-")
            for index in range(count):
                port, admin = free_ports(2)
                name = f"{kind}-{index}"
                env = {"ADMIN_PORT": str(admin), "KAFKA_INSTANCE_ID": name}
                if service == GATEWAY:
                    port = gateway
                    if count > 1:
                        env["REUSE_PORT"] = "true"
                elif role == "api":
                    upstreams[service].append(port)
                env["PORT"] = str(port)
                services.append(_Service(name, (f"services.{service}", role), env, admin, (service,)))
        return gateway, upstreams, services

    def _environment(
        self, gateway: int | None = None, upstreams: Mapping[str, list[int]] | None = None
    ) -> dict[str, str]:
        """The contract of the services' settings. What does not apply is set to nothing, so that a variable of the
        shell cannot stand in for it."""
        objects = self._data / "objects"
        objects.mkdir(exist_ok=True)
        env = dict(os.environ) | {
            "HOST": "127.0.0.1",
            "BUS": self.topology.bus,
            "KAFKA_BOOTSTRAP": self._kafka.bootstrap if self._kafka else "",
            "KAFKA_IDEMPOTENCE": "false" if self.broker_kind == "tansu" else "true",
            "KAFKA_SESSION_TIMEOUT_SECONDS": "6" if self.broker_kind == "tansu" else "10",
            "KAFKA_INSTANCE_ID": "",
            "REUSE_PORT": "",
            "DATABASE_POOLS": str(max(1, self.topology.pools)),
            "REDIS_URL": self._redis.url if self._redis else "",
            "USERS_SIGNING_KEY_SECRET": self._secrets["users_signing_key"],
            "LINK_SECRET": self._secrets["link"],
            "OBJECT_STORE_URL": objects.as_uri(),
            "MEDIA_URL_SECRET": self._secrets["media_url"],
            "SMTP_URL": f"smtp://127.0.0.1:{self._smtp_port}",
            "MAIL_FROM": "Tenfold <no-reply@tenfold.test>",
            "DRAIN_SECONDS": "0",
            "NOTIFIER_WEBHOOK_PRIVATE_NETWORKS": "127.0.0.0/8,::1/128",
            # Everybody here has one address.
            "LIMIT_DEFAULT": "5000/1",
            "LIMIT_CREDENTIALS": "6000/60",
            "LIMIT_UPLOAD": "6000/60",
            # Less than what we wait for it, so that a service with open streams ends by itself.
            "SHUTDOWN_SECONDS": "3",
            "PYTHONUNBUFFERED": "1",
        }
        for name in WITH_DATABASE:
            env[f"{name.upper()}_DATABASE_URL"] = self.database_url(name)
            env[f"{name.upper()}_DATABASE_REPLICA_URLS"] = ",".join(self.replica_urls(name))
        for name, ports in (upstreams or {}).items():
            env[f"UPSTREAM_{name.upper()}"] = ",".join(f"http://127.0.0.1:{port}" for port in ports)
        if upstreams and upstreams["users"]:
            env["JWKS_URL"] = f"http://127.0.0.1:{upstreams['users'][0]}/.well-known/jwks.json"
        if gateway is not None:
            env["PUBLIC_URL"] = f"http://127.0.0.1:{gateway}"
        return env | self._extra_env

    def _make_urls(self, gateway: int | None) -> Urls:
        admin: dict[str, list[str]] = {}
        for service in self._services:
            for name in service.services:
                admin.setdefault(name, []).append(f"http://127.0.0.1:{service.admin_port}")
        return Urls(
            gateway=None if gateway is None else f"http://127.0.0.1:{gateway}",
            mail=f"http://127.0.0.1:{self._mail_port}",
            smtp=f"smtp://127.0.0.1:{self._smtp_port}",
            postgres_primary=self._postgres.primary_url,
            postgres_replicas=tuple(self._postgres.replica_urls),
            redis=self._redis.url if self._redis else None,
            kafka=self._kafka.bootstrap if self._kafka else None,
            admin={name: tuple(urls) for name, urls in admin.items()},
        )

    async def _timed(self, what: str, work: Awaitable[None]) -> None:
        start = time.perf_counter()
        await work
        self.timings[what] = time.perf_counter() - start
        self._report(f"{what}: ready in {self.timings[what]:.1f} s")


async def _all(*work: Awaitable[None]) -> None:
    """Run in parallel; the first failure cancels the others and is raised as it is."""
    tasks = [asyncio.ensure_future(one) for one in work]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _terminate(seconds: float) -> tuple[tuple[signal.Signals, float], ...]:
    return ((signal.SIGTERM, seconds),)


def _http_ready(url: str) -> Callable[[], Awaitable[bool]]:
    async def ready() -> bool:
        timeout = aiohttp.ClientTimeout(total=2.0)
        try:
            async with aiohttp.ClientSession(timeout=timeout) as session, session.get(url) as response:
                return response.status == 200
        except aiohttp.ClientError:
            return False

    return ready


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the lock of a folder; raises `StackError` when another process does."""
    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            owner = file.read().strip() or "unknown"
            raise StackError(
                f"a stack is running in {path.parent} already (process {owner}): stop it, or choose another folder"
            ) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def _load_secrets(path: Path) -> dict[str, str]:
    """Generated once, kept with the data they belong to."""
    known: dict[str, str] = json.loads(path.read_text()) if path.exists() else {}
    if missing := [name for name in _SECRET_NAMES if name not in known]:
        known |= {name: secrets.token_hex(24) for name in missing}
        _write_atomically(path, json.dumps(known, indent=2) + "\n")
    return known


def _write_atomically(path: Path, text: str) -> None:
    """Both files hold passwords: readable by us only."""
    temporary = path.with_name(f".{path.name}.new")
    temporary.unlink(missing_ok=True)
    with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
