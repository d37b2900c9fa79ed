"""A process: what it is made of, how it starts, and how it stops without losing anything.

Start: settings -> telemetry -> schema current? -> resources, in order, on one `AsyncExitStack` -> listeners -> ready.
Stop (SIGTERM, SIGINT): not ready -> wait `DRAIN_SECONDS` for the balancer -> stop accepting -> finish requests and
events in hand -> close the resources in reverse order.

Exit status: 0 stopped, 1 failed, 78 configured wrongly.
"""

import asyncio
import contextlib
import gc
import os
import resource
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, NoReturn, TypeVar

import aiohttp
import asyncpg
import msgspec
import uvloop
from aiohttp import http_parser, web

from shared import budget, http_client, logs, metrics, migrate, settings, tracing, workers
from shared.bus import InlineBus, KafkaBus
from shared.errors import TenfoldError
from shared.health import Health, admin_application
from shared.listener import listening
from shared.redis import Redis
from shared.settings import DataSettings, ProcessSettings

S = TypeVar("S", bound=ProcessSettings)
T = TypeVar("T")

log = logs.get_logger()

EXIT_FAILED = 1
EXIT_CONFIGURATION = 78  # EX_CONFIG of sysexits.h
_WAIT_FOR_DATABASE_SECONDS = 30.0
_LAG_PROBE_SECONDS = 0.5


class Process:
    """What the parts of one process share, and the stack that closes all of it in reverse order."""

    def __init__(self, stack: AsyncExitStack, http: aiohttp.ClientSession) -> None:
        self.health = Health()
        self.http = http
        self._stack = stack
        self._bus: InlineBus | KafkaBus | None = None
        self._redis: dict[str, Redis] = {}
        self._ones: dict[type[Any], Any] = {}
        self._failed = asyncio.Event()

    async def enter(self, resource: AbstractAsyncContextManager[T]) -> T:
        return await self._stack.enter_async_context(resource)

    async def bus(self, settings: DataSettings) -> InlineBus | KafkaBus:
        """The bus of this process: the same for all of its parts."""
        if self._bus is None:
            if settings.bus == "inline":
                self._bus = InlineBus()
            else:
                self._bus = await self.enter(KafkaBus.opened(settings, self.health))
        return self._bus

    async def redis(self, url: str | None) -> Redis | None:
        """Redis at `url`; `None` where the stage has none."""
        if url is None:
            return None
        if url not in self._redis:
            self._redis[url] = await self.enter(Redis.opened(url))
        return self._redis[url]

    def one(self, kind: type[T]) -> T:
        """The `kind()` of this process, for what the roles of a service share when they run in the same one."""
        if kind not in self._ones:
            self._ones[kind] = kind()
        found: T = self._ones[kind]
        return found

    async def background(self, name: str, work: Callable[[], Awaitable[None]]) -> None:
        """Run `work` until the process stops. If it ends by an error the process fails: nothing dies unseen."""

        async def watched() -> None:
            try:
                await work()
            except Exception:
                log.exception("background_failed", task=name)
                self._failed.set()

        @asynccontextmanager
        async def running() -> AsyncIterator[None]:
            task = asyncio.create_task(watched(), name=name)
            try:
                yield
            finally:
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task

        await self.enter(running())

    async def failed(self) -> None:
        await self._failed.wait()

    def deliver(self) -> None:
        """Everything is built: events may flow, until the first of it is closed."""
        if isinstance(self._bus, InlineBus):
            self._bus.open_for_delivery()
            self._stack.callback(self._bus.close_for_delivery)


@dataclass(frozen=True)
class Command:
    """What an operator runs once: `python -m services.<name> <command> <arguments>`. It answers the exit status."""

    run: Callable[..., Awaitable[int]]  # (process, settings, *arguments)
    arguments: tuple[str, ...] = ()


@dataclass(frozen=True)
class Service(Generic[S]):
    """What `python -m services.<name>` can run. `api` answers the application, `worker` starts what consumes."""

    name: str
    settings: type[S]
    api: Callable[[Process, S], Awaitable[web.Application]]
    worker: Callable[[Process, S], Awaitable[None]] | None = None
    migrations: Path | None = None
    commands: Mapping[str, Command] = field(default_factory=dict)

    def roles(self) -> list[str]:
        return ["api"] + ["worker"] * (self.worker is not None) + ["migrate"] * (self.migrations is not None)


@dataclass(frozen=True)
class Part(Generic[S]):
    """A service in one of its roles, with its settings."""

    service: Service[S]
    role: str
    settings: S


def main(service: Service[Any]) -> NoReturn:
    """`python -m services.<name> [api|worker|migrate|<a command of its own>]`; the default is `api`."""
    role, *arguments = sys.argv[1:] or ["api"]
    command = service.commands.get(role)
    if command is not None and len(arguments) == len(command.arguments):
        sys.exit(run_command(service, command, arguments))
    if role not in service.roles() or arguments:
        usages = service.roles() + [" ".join((name, *c.arguments)) for name, c in service.commands.items()]
        print(f"usage: python -m services.{service.name} [{'|'.join(usages)}]", file=sys.stderr)  # noqa: T201
        sys.exit(EXIT_CONFIGURATION)
    if role == "migrate":
        sys.exit(run_migrations([service]))
    sys.exit(run([(service, role)]))


def run_command(
    service: Service[Any], command: Command, arguments: Sequence[str], environ: Mapping[str, str] = os.environ
) -> int:
    """Run a command of `service` to its end; returns the exit status. What is refused is said in one line."""
    try:
        own = settings.load(service.settings, service.name, environ)
    except settings.SettingsError as error:
        return _refuse(error.lines)
    logs.setup(service.name, "warning")

    async def work() -> int:
        async with AsyncExitStack() as stack:
            process = Process(stack, await stack.enter_async_context(http_client.session()))
            return await command.run(process, own, *arguments)

    try:
        return asyncio.run(work())
    except (TenfoldError, asyncpg.PostgresError, OSError) as error:
        print(f"{service.name}: {error}", file=sys.stderr)  # noqa: T201
        return EXIT_FAILED


def run(roles: Sequence[tuple[Service[Any], str]], environ: Mapping[str, str] = os.environ) -> int:
    """Run the roles in this process until it is told to stop; returns the exit status."""
    try:
        parts = [Part(service, role, settings.load(service.settings, service.name, environ)) for service, role in roles]
    except settings.SettingsError as error:
        return _refuse(error.lines)
    if isinstance(http_parser.HttpRequestParser, type) and http_parser.HttpRequestParser is getattr(
        http_parser, "HttpRequestParserPy", None
    ):
        return _refuse(["aiohttp: its C extensions are missing, and its Python parser accepts other requests"])
    name = roles[0][0].name if len({service.name for service, _ in roles}) == 1 else "tenfold"
    common: ProcessSettings = parts[0].settings
    logs.setup(name, common.log_level)
    _allow_files()
    if common.workers > 1:
        return workers.run(
            common.workers, lambda index: _run(name, [_of_worker(part, index, common.workers) for part in parts])
        )
    return _run(name, parts)


def _allow_files() -> None:
    """As many open files, which connections are, as we may have: the usual 1024 are fewer than our callers."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _of_worker(part: Part[Any], index: int, number: int) -> Part[Any]:
    """What differs among the processes that share a port, and what there is so many times."""
    own: ProcessSettings = msgspec.structs.replace(
        part.settings, admin_port=part.settings.admin_port + index, reuse_port=True
    )
    if isinstance(own, DataSettings):
        member = None if own.kafka_instance_id is None else f"{own.kafka_instance_id}-{index}"
        pools = own.database_pools * number
        own = msgspec.structs.replace(own, kafka_instance_id=member, database_pools=pools)
    return Part(part.service, part.role, own)


def _run(name: str, parts: Sequence[Part[Any]]) -> int:
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(_serve(name, parts))
    except (migrate.MigrationError, budget.DoesNotFit) as error:
        return _refuse([str(error)])
    except Exception:
        log.exception("process_failed")
        return EXIT_FAILED


def run_migrations(services: Sequence[Service[Any]], environ: Mapping[str, str] = os.environ) -> int:
    """Bring the schemas of `services` to the newest state; returns the exit status."""
    try:
        loaded = [(s, settings.load(_MigrationSettings, s.name, environ)) for s in services if s.migrations]
    except settings.SettingsError as error:
        return _refuse(error.lines)
    logs.setup("migrate", "info")
    for service, found in loaded:
        assert service.migrations is not None
        try:
            asyncio.run(_patiently(migrate.migrate, found.database_url, service.name, service.migrations))
        except (migrate.MigrationError, asyncpg.PostgresError, OSError) as error:
            print(f"{service.name}: {error}", file=sys.stderr)  # noqa: T201
            return EXIT_FAILED
    return 0


class _MigrationSettings(ProcessSettings, frozen=True, kw_only=True):
    database_url: str


def _refuse(lines: list[str]) -> int:
    for line in lines:
        print(line, file=sys.stderr)  # noqa: T201
    return EXIT_CONFIGURATION


def spare_collector() -> None:
    """Have the garbage collector look at what lives long more rarely, and never again at what there is now.

    Cycles are few here, and short-lived. With the interpreter's own settings a consumer with some thousand events in
    hand spent 30 % of its time on finding none (docs/adr/0041).
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(700, 10, 50)


async def _serve(name: str, parts: Sequence[Part[Any]]) -> int:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    common: ProcessSettings = parts[0].settings
    for part in parts:
        if isinstance(part.settings, DataSettings) and part.service.migrations is not None:
            url, folder = part.settings.database_url, part.service.migrations
            await _patiently(migrate.require_current, url, part.service.name, folder)
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(
            tracing.opened(name, common.otel_exporter_otlp_endpoint, common.otel_sample_ratio)
        )
        process = Process(stack, await stack.enter_async_context(http_client.session()))
        await process.background("loop-lag", _measure_loop_lag)
        applications = []
        for part in parts:
            if part.role == "api":
                applications.append((await part.service.api(process, part.settings), part.settings))
            elif part.service.worker is not None:
                await part.service.worker(process, part.settings)
        await stack.enter_async_context(listening(admin_application(process.health), common, common.admin_port))
        process.deliver()
        listeners = [
            await stack.enter_async_context(listening(application, own, own.port, reuse_port=own.reuse_port))
            for application, own in applications
        ]
        spare_collector()
        process.health.started()
        log.info("started", parts=[f"{part.service.name}-{part.role}" for part in parts])
        waiting = [asyncio.create_task(stop.wait()), asyncio.create_task(process.failed())]
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        failed = not stop.is_set()
        for task in waiting:
            task.cancel()
        process.health.stopping()
        for listener in listeners:
            listener.drain()
        log.info("stopping", drain_seconds=common.drain_seconds)
        if not failed:
            await asyncio.sleep(common.drain_seconds)
    log.info("stopped")
    return EXIT_FAILED if failed else 0


async def _patiently(ask: Callable[..., Awaitable[T]], *args: Any) -> T:
    """A process may start before its database does."""
    until = asyncio.get_running_loop().time() + _WAIT_FOR_DATABASE_SECONDS
    while True:
        try:
            return await ask(*args)
        except (OSError, TimeoutError, asyncpg.PostgresConnectionError, asyncpg.CannotConnectNowError) as error:
            if asyncio.get_running_loop().time() > until:
                raise
            log.warning("database_awaited", error=str(error))
            await asyncio.sleep(0.5)


async def _measure_loop_lag() -> None:
    loop = asyncio.get_running_loop()
    while True:
        before = loop.time()
        await asyncio.sleep(_LAG_PROBE_SECONDS)
        metrics.LOOP_LAG.observe(max(0.0, loop.time() - before - _LAG_PROBE_SECONDS))
