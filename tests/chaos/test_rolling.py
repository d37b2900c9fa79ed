"""Gateways and users services that are restarted one after the other while people work."""

import asyncio
import itertools
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import pytest

from devstack.ports import free_ports
from devstack.stack import Stack
from devstack.supervisor import Child, Spec, run
from devstack.topology import Topology
from tests.serving import Api

pytestmark = pytest.mark.timeout(300)

PEOPLE = 12
ROUNDS = 2


async def answers(url: str, http: aiohttp.ClientSession) -> bool:
    try:
        async with http.get(url) as response:
            return response.status == 200
    except aiohttp.ClientError:
        return False


@dataclass
class Balancer:
    """Stands for HAProxy: asks each gateway whether it is ready, and sends new requests to those that are. Nothing is
    sent twice: what fails has failed."""

    gateways: dict[str, str]  # base URL -> its readiness
    http: aiohttp.ClientSession
    ready: list[str] = field(default_factory=list)

    async def watch(self) -> None:
        while True:
            found = [await answers(readiness, self.http) for readiness in self.gateways.values()]
            self.ready = list(itertools.compress(self.gateways, found))
            await asyncio.sleep(0.05)


@dataclass
class Person:
    """Works without a pause over kept connections: reads, and now and then a write."""

    balancer: Balancer
    http: aiohttp.ClientSession
    token: str
    served: int = 0
    failures: list[str] = field(default_factory=list)

    async def work(self) -> None:
        headers = {"Authorization": f"Bearer {self.token}"}
        for number in itertools.count():
            gateway = self.balancer.ready[number % len(self.balancer.ready)]
            method, body = ("PATCH", {"bio": str(number)}) if number % 4 == 0 else ("GET", None)
            try:
                async with self.http.request(
                    method, f"{gateway}/api/v1/users/me", json=body, headers=headers
                ) as response:
                    text = await response.text()
                    if response.status == 200:
                        self.served += 1
                    else:
                        self.failures.append(f"{method} {response.status} {text}")
            except aiohttp.ClientError as error:
                self.failures.append(f"{method} {error!r}")


class Platform:
    """Two users services behind two gateways, without a broker."""

    def __init__(self, stack: Stack, drain_seconds: float) -> None:
        self._stack = stack
        self._ports = free_ports(8)
        self.gateways = {
            f"http://127.0.0.1:{p}": f"http://127.0.0.1:{a}/health/ready" for p, a in self._pairs("gateway")
        }
        users = ",".join(f"http://127.0.0.1:{port}" for port, _ in self._pairs("users"))
        self._env = stack.env | {
            "UPSTREAM_USERS": users,
            "UPSTREAM_MEDIA": "http://127.0.0.1:1",
            "UPSTREAM_NOTIFIER": "http://127.0.0.1:1",
            "JWKS_URL": f"{users.partition(',')[0]}/.well-known/jwks.json",
            "PUBLIC_URL": next(iter(self.gateways)),
            "DRAIN_SECONDS": str(drain_seconds),
            "SHUTDOWN_SECONDS": "10",
        }

    def _pairs(self, service: str) -> list[tuple[int, int]]:
        a, b, c, d = self._ports[:4] if service == "gateway" else self._ports[4:]
        return [(a, b), (c, d)]

    async def start(self, http: aiohttp.ClientSession, root: Path) -> list[Child]:
        command = [sys.executable, "-m", "services.users", "migrate"]
        await run(command, log=root / "migrate.log", what="migrations", env=self._env)
        children = []
        for service in ("users", "gateway"):
            for index, (port, admin) in enumerate(self._pairs(service)):
                url = f"http://127.0.0.1:{admin}/health/ready"
                spec = Spec(
                    name=f"{service}-{index}",
                    command=(sys.executable, "-m", f"services.{service}"),
                    env=self._env | {"PORT": str(port), "ADMIN_PORT": str(admin)},
                    ready=lambda url=url: answers(url, http),  # type: ignore[misc]
                    stop=((15, 30.0),),  # type: ignore[arg-type]
                )
                children.append(self._stack.supervisor.add(spec))
                await children[-1].start()
        return children


@asynccontextmanager
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(cookie_jar=aiohttp.DummyCookieJar()) as http:
        http._retry_connection = False  # a second try behind our back would hide what this test looks for
        yield http


async def token(gateway: str, http: aiohttp.ClientSession, number: int) -> str:
    api = Api(gateway, http)
    who = {"email": f"rolling-{number}@example.org", "password": "correct horse battery"}
    assert (await api.post("/api/v1/users", {**who, "display_name": "Ann"})).status == 201
    made = await api.post("/api/v1/sessions", who)
    assert made.status == 201
    access: str = made.body["access_token"]
    return access


async def test_rolling_restarts_fail_no_request(tmp_path: Path) -> None:
    async with AsyncExitStack() as opened:
        stack = Stack(Topology.backing(replicas=0, broker="none"), root=tmp_path, durable=False, keep_data=False)
        await opened.enter_async_context(stack)
        http = await opened.enter_async_context(session())
        platform = Platform(stack, drain_seconds=1)
        children = await platform.start(http, tmp_path)
        balancer = Balancer(platform.gateways, http, list(platform.gateways))
        people = [
            Person(balancer, await opened.enter_async_context(session()), await token(balancer.ready[0], http, number))
            for number in range(PEOPLE)
        ]
        tasks = [asyncio.create_task(work) for work in (balancer.watch(), *(person.work() for person in people))]
        opened.callback(lambda: [task.cancel() for task in tasks])
        for _ in range(ROUNDS):
            for child in children:
                await child.restart()
        await asyncio.sleep(1)
        assert not any(task.done() for task in tasks)
        served = [person.served for person in people]
        failures = [failure for person in people for failure in person.failures]
        print(f"\n{ROUNDS * len(children)} restarts: {sum(served)} requests served, {len(failures)} failed")
        assert failures == []
        assert min(served) > 100
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
