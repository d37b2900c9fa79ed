"""The backing servers as containers, for `BACKING=containers`: the images of docker-compose.yml, on testcontainers.

Mail still goes to the sink of the development stack, for its faults can be switched.
"""

import asyncio
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import aiohttp
import aiokafka
import asyncpg
import redis.asyncio
from aiokafka.errors import KafkaError
from testcontainers.core.container import DockerContainer
from testcontainers.core.network import Network

from devstack.ports import free_port, free_ports
from shared.testing import eventually

if TYPE_CHECKING:
    from tests.backing import Backing

_REPOSITORY = Path(__file__).parent.parent
_SCRIPTS = _REPOSITORY / "scripts" / "postgres"
_PASSWORD = "test"
_READY_SECONDS = 90.0
_REPLICAS = 2


@asynccontextmanager
async def started() -> "AsyncIterator[Backing]":
    from tests.backing import Backing

    async with AsyncExitStack() as stack:
        network = stack.enter_context(Network())
        primary_port, redis_port, kafka_port, *replica_ports = free_ports(3 + _REPLICAS)
        primary = _postgres(network, primary_port, f"{_SCRIPTS}/primary-init.sh:/docker-entrypoint-initdb.d/init.sh")
        primary.with_network_aliases("postgres")
        primary.with_env("REPLICATION_SLOTS", " ".join(f"replica_{number}" for number in range(_REPLICAS)))
        await _run(stack, primary)
        primary_url, *replica_urls = (
            f"postgresql://postgres:{_PASSWORD}@127.0.0.1:{port}/tenfold" for port in (primary_port, *replica_ports)
        )
        await eventually(_answers(lambda: _select(primary_url)), within=_READY_SECONDS)
        for number, port in enumerate(replica_ports):
            replica = _postgres(network, port, f"{_SCRIPTS}/replica.sh:/replica.sh")
            replica.with_env("PRIMARY_HOST", "postgres").with_env("PGPASSWORD", _PASSWORD)
            replica.with_env("REPLICATION_SLOT", f"replica_{number}")
            replica.with_kwargs(entrypoint=["/replica.sh"], user="postgres")
            await _run(stack, replica)
        await _run(stack, DockerContainer("redis:7-alpine").with_bind_ports(6379, redis_port))
        broker = DockerContainer("apache/kafka:4.1.0").with_bind_ports(9092, kafka_port)
        for name, value in {
            "NODE_ID": "1",
            "PROCESS_ROLES": "broker,controller",
            "LISTENERS": "PLAINTEXT://:9092,CONTROLLER://:9093",
            "ADVERTISED_LISTENERS": f"PLAINTEXT://127.0.0.1:{kafka_port}",
            "CONTROLLER_LISTENER_NAMES": "CONTROLLER",
            "LISTENER_SECURITY_PROTOCOL_MAP": "CONTROLLER:PLAINTEXT,PLAINTEXT:PLAINTEXT",
            "CONTROLLER_QUORUM_VOTERS": "1@localhost:9093",
            "OFFSETS_TOPIC_REPLICATION_FACTOR": "1",
            "TRANSACTION_STATE_LOG_REPLICATION_FACTOR": "1",
            "TRANSACTION_STATE_LOG_MIN_ISR": "1",
            "GROUP_INITIAL_REBALANCE_DELAY_MS": "0",
            "GROUP_MIN_SESSION_TIMEOUT_MS": "1000",
        }.items():
            broker.with_env(f"KAFKA_{name}", value)
        await _run(stack, broker)
        redis_url, kafka = f"redis://127.0.0.1:{redis_port}/0", f"127.0.0.1:{kafka_port}"
        for url in replica_urls:
            await eventually(_answers(partial(_select, url)), within=_READY_SECONDS)
        await eventually(_answers(lambda: _ping(redis_url)), within=_READY_SECONDS)
        await eventually(_answers(lambda: _metadata(kafka)), within=_READY_SECONDS)
        mail, smtp = await _mail_sink(stack)
        yield Backing(
            postgres=primary_url,
            replicas=replica_urls,
            redis=redis_url,
            kafka=kafka,
            broker="apache" if await _takes_idempotent_producer(kafka) else "tansu",
            mail=mail,
            smtp=smtp,
            stack=None,
        )


def _postgres(network: Network, port: int, script: str) -> DockerContainer:
    source, target = script.split(":")
    return (
        DockerContainer("postgres:17")
        .with_network(network)
        .with_bind_ports(5432, port)
        .with_env("POSTGRES_DB", "tenfold")
        .with_env("POSTGRES_PASSWORD", _PASSWORD)
        .with_env("REPLICATION_PASSWORD", _PASSWORD)
        .with_volume_mapping(source, target, "ro")
        .with_command("-c fsync=off -c max_connections=200")
    )


async def _run(stack: AsyncExitStack, container: DockerContainer) -> None:
    await asyncio.to_thread(container.start)
    stack.callback(container.stop)


def _answers(ask: Callable[[], Awaitable[Any]]) -> Callable[[], Awaitable[bool]]:
    async def answers() -> bool:
        try:
            async with asyncio.timeout(5):
                await ask()
        except (OSError, TimeoutError, asyncpg.PostgresError, redis.RedisError, KafkaError, aiohttp.ClientError):
            return False
        return True

    return answers


async def _select(url: str) -> None:
    connection = await asyncpg.connect(url)
    await connection.close()


async def _ping(url: str) -> None:
    async with redis.asyncio.Redis.from_url(url) as client:
        await client.ping()


async def _metadata(bootstrap: str, *, idempotent: bool = False) -> None:
    producer = aiokafka.AIOKafkaProducer(bootstrap_servers=bootstrap, enable_idempotence=idempotent)
    try:
        await producer.start()
        if idempotent:
            await producer.send_and_wait("probe", b"")
    finally:
        await producer.stop()


async def _takes_idempotent_producer(bootstrap: str) -> bool:
    """The stand-in of an offline machine does not."""
    return await _answers(lambda: _metadata(bootstrap, idempotent=True))()


async def _mail_sink(stack: AsyncExitStack) -> tuple[str, str]:
    smtp, http = free_port(), free_port()
    command = [sys.executable, "-m", "devstack.mail", "--smtp-port", str(smtp), "--http-port", str(http)]
    sink = await asyncio.create_subprocess_exec(*command, cwd=_REPOSITORY)
    stack.push_async_callback(sink.wait)
    stack.callback(sink.terminate)

    async def stats() -> None:
        async with aiohttp.ClientSession() as session, session.get(f"http://127.0.0.1:{http}/stats") as response:
            response.raise_for_status()

    await eventually(_answers(stats), within=_READY_SECONDS)
    return f"http://127.0.0.1:{http}", f"smtp://127.0.0.1:{smtp}"
