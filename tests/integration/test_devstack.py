"""The embedded stack itself: starting, keeping data, telling of deaths, leaving nothing behind."""

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from email.message import EmailMessage
from pathlib import Path

import aiohttp
import aiosmtplib
import asyncpg
import psutil
import pytest

from devstack import kafka, postgres
from devstack.postgres import wait_replayed
from devstack.stack import Stack, Urls
from devstack.supervisor import ChildError, Spec, StackError, Supervisor
from devstack.topology import Topology

SMALL = Topology(redis=1)
PROGRAM = """
import asyncio, pathlib, sys
from devstack.__main__ import Console, dev
from devstack.topology import Topology
sys.exit(asyncio.run(dev(Topology.backing(replicas=1, broker="tansu"), pathlib.Path(sys.argv[1]), Console())))
"""


async def eventually(condition: Callable[[], bool], what: str, seconds: float = 15.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        await asyncio.sleep(0.02)


async def ask(url: str, query: str, *arguments: object) -> object:
    connection = await asyncpg.connect(url)
    try:
        return await connection.fetchval(query, *arguments)
    finally:
        await connection.close()


async def redis(url: str, command: str, seconds: float = 2.0) -> str:
    port = int(url.rsplit(":", 1)[1].split("/")[0])
    async with asyncio.timeout(seconds):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            writer.write(f"{command}\r\n".encode())
            line = (await reader.readline()).decode().strip()
            return (await reader.readline()).decode().strip() if line.startswith("$") else line
        finally:
            writer.close()


@asynccontextmanager
async def running(root: Path, topology: Topology = SMALL, **options: object) -> AsyncIterator[Stack]:
    """A stack whose data does not outlive the test, wherever it had to be put."""
    lines: list[str] = []
    try:
        async with Stack(topology, root=root, report=lines.append, **options) as stack:  # type: ignore[arg-type]
            yield stack
    except ChildError:
        print("\n".join(lines))
        raise


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "stack"
    postgres.remove_data(postgres.locate(tmp_path / "stack", lambda _line: None))


async def test_backing_servers_answer_and_the_replica_streams(root: Path) -> None:
    async with running(root, Topology.backing(replicas=1), durable=False) as stack:
        urls = stack.urls
        await ask(urls.postgres_primary, "CREATE TABLE t AS SELECT 7 AS n")
        await wait_replayed(urls.postgres_primary, urls.postgres_replicas[0])
        assert await ask(urls.postgres_replicas[0], "SELECT n FROM t") == 7
        assert await ask(urls.postgres_replicas[0], "SELECT pg_is_in_recovery()") is True
        assert await ask(stack.database_url("users"), "SELECT current_schema") == "users"
        assert await redis(urls.redis or "", "PING") == "+PONG"
        assert await kafka.answers_metadata(urls.kafka or "")
        assert stack.broker_kind == kafka.plan("auto").kind
        assert json.loads((root / "urls.json").read_text()) == urls.as_json()
        assert urls.as_json()["gateway"] is None
        pids = [child.pid for child in stack.supervisor.children.values()]
    assert not (root / "urls.json").exists()
    assert not [pid for pid in pids if psutil.pid_exists(pid)]


async def test_data_survives_and_the_replica_follows_the_new_port(root: Path) -> None:
    topology = Topology(postgres_replicas=1, redis=1)
    async with running(root, topology) as stack:
        before = stack.urls
        await ask(before.postgres_primary, "CREATE TABLE kept AS SELECT 'here' AS word")
        assert await redis(before.redis or "", "SET word here") == "+OK"
    async with running(root, topology) as stack:
        urls = stack.urls
        assert urls.postgres_primary != before.postgres_primary
        assert await redis(urls.redis or "", "GET word") == "here"
        await ask(urls.postgres_primary, "INSERT INTO kept VALUES ('again')")
        await wait_replayed(urls.postgres_primary, urls.postgres_replicas[0])
        assert await ask(urls.postgres_replicas[0], "SELECT count(*) FROM kept") == 2
    assert oct((root / "data" / "secrets.json").stat().st_mode & 0o777) == "0o600"


async def test_a_replica_that_missed_a_run_or_was_promoted_is_made_anew(root: Path) -> None:
    topology = Topology(postgres_replicas=1)
    async with running(root, topology, durable=False):
        pass
    async with running(root, Topology(), durable=False) as stack:
        await ask(stack.urls.postgres_primary, "CREATE TABLE missed AS SELECT 1 AS n")
    async with running(root, topology, durable=False) as stack:
        replica = stack.urls.postgres_replicas[0]
        assert await ask(replica, "SELECT n FROM missed") == 1
        assert await ask(replica, "SELECT pg_promote()") is True
        await ask(replica, "CREATE TABLE astray AS SELECT 1 AS n")
    async with running(root, topology, durable=False) as stack:
        replica = stack.urls.postgres_replicas[0]
        assert await ask(replica, "SELECT pg_is_in_recovery()") is True
        assert await ask(replica, "SELECT to_regclass('astray') IS NULL") is True


async def test_a_server_that_dies_is_reported_with_its_last_log_lines_and_fails_the_stack(root: Path) -> None:
    lines: list[str] = []

    async def lose_redis() -> None:
        async with Stack(SMALL, root=root, durable=False, report=lines.append) as stack:
            os.kill(stack.child("redis").pid, signal.SIGKILL)
            await asyncio.wait([stack.failure], timeout=10)
            with pytest.raises(ChildError):
                stack.check()

    with pytest.raises(ChildError, match=r"redis died \(signal SIGKILL\)"):
        await lose_redis()
    assert any("redis died" in line and "Ready to accept connections" in line for line in lines)


async def test_servers_that_die_come_back_with_their_data_on_the_same_ports(root: Path) -> None:
    async with running(root) as stack:
        urls = stack.urls
        await ask(urls.postgres_primary, "CREATE TABLE t AS SELECT 1 AS n")
        servers = [stack.child("postgres-primary"), stack.child("redis")]
        pids = [server.pid for server in servers]
        for server in servers:
            os.kill(server.pid, signal.SIGKILL)
        for server, pid in zip(servers, pids, strict=True):
            await eventually(lambda server=server, pid=pid: server.pid != pid, f"a new {server.name}")  # type: ignore[misc]
            await server.wait_ready()
        assert await ask(urls.postgres_primary, "SELECT n FROM t") == 1
        assert await redis(urls.redis or "", "PING") == "+PONG"
        stack.check()


async def test_what_is_killed_on_purpose_is_not_reported_and_comes_back_with_its_data(root: Path) -> None:
    async with running(root, durable=False) as stack:
        urls = stack.urls
        await ask(urls.postgres_primary, "CREATE TABLE t AS SELECT 1 AS n")
        primary = stack.child("postgres-primary")
        pid = primary.pid
        await primary.kill()
        assert not primary.running
        assert primary.returncode == -signal.SIGKILL
        await primary.restart()
        assert primary.pid != pid
        assert await ask(urls.postgres_primary, "SELECT n FROM t") == 1
        stack.check()


async def test_a_paused_server_hangs_until_it_is_resumed(root: Path) -> None:
    async with running(root, durable=False) as stack:
        url = stack.urls.redis or ""
        stack.child("redis").pause()
        with pytest.raises(TimeoutError):
            await redis(url, "PING", seconds=0.2)
        stack.child("redis").resume()
        assert await redis(url, "PING") == "+PONG"
        stack.child("redis").pause()  # stopping must not hang on it


async def test_a_start_that_fails_names_the_child_and_leaves_nothing(
    root: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    broken = tmp_path / "broken-server"
    broken.write_text("#!/bin/sh\necho no such option\nexit 3\n")
    broken.chmod(0o755)
    monkeypatch.setenv("REDIS_SERVER", str(broken))
    before = set(psutil.Process().children(recursive=True))  # the session's own stack
    with pytest.raises(StackError, match=r"(?s)redis ended at its start \(exit status 3\).*no such option"):
        async with running(root, durable=False):
            pass
    assert set(psutil.Process().children(recursive=True)) <= before
    monkeypatch.delenv("REDIS_SERVER")
    async with running(root, durable=False):
        pass


async def test_two_stacks_at_a_time_but_not_in_one_folder(root: Path, tmp_path: Path) -> None:
    other = Stack(SMALL, root=tmp_path / "other", durable=False, keep_data=False)
    async with running(root, durable=False) as stack, other:
        assert stack.urls.redis != other.urls.redis
        with pytest.raises(StackError, match=r"running in .* already"):
            async with Stack(SMALL, root=root):
                pass
        assert json.loads((root / "urls.json").read_text()) == stack.urls.as_json()
    assert not (tmp_path / "other" / "data").exists()


def spawn(root: Path, log: Path) -> subprocess.Popen[bytes]:
    with log.open("wb") as output:
        return subprocess.Popen([sys.executable, "-c", PROGRAM, str(root)], stdout=output, stderr=subprocess.STDOUT)


async def start_program(root: Path, log: Path) -> tuple[subprocess.Popen[bytes], list[psutil.Process]]:
    """`make dev` without services, in a process of its own; ready, with all its descendants."""
    program = spawn(root, log)
    await eventually(lambda: (root / "urls.json").exists() or program.poll() is not None, "urls.json", 30)
    assert program.poll() is None, f"it ended at its start: see {log}"
    return program, psutil.Process(program.pid).children(recursive=True)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_stops_within_ten_seconds_and_leaves_no_process(
    root: Path, tmp_path: Path, number: signal.Signals
) -> None:
    program, processes = await start_program(root, tmp_path / "log")
    names = {process.name() for process in processes}
    assert {"postgres", "valkey-server", "tansu"} <= names

    program.send_signal(number)
    assert await asyncio.to_thread(program.wait, 10) == 0

    await eventually(lambda: not any(alive(process.pid) for process in processes), "the end of all of them", 1)
    assert not (root / "urls.json").exists()
    assert (tmp_path / "log").read_text().rstrip().endswith("stopped")


async def test_nothing_outlives_a_killed_supervisor_and_the_next_start_works(root: Path, tmp_path: Path) -> None:
    program, processes = await start_program(root, tmp_path / "log")

    program.kill()
    await asyncio.to_thread(program.wait, 10)

    await eventually(lambda: not any(alive(process.pid) for process in processes), "the end of all of them", 10)
    assert (root / "urls.json").exists()
    (root / "urls.json").unlink()  # the next start would; here its coming again is what we wait for
    program, _ = await start_program(root, tmp_path / "log2")
    program.send_signal(signal.SIGINT)
    assert await asyncio.to_thread(program.wait, 10) == 0


async def test_a_service_that_dies_is_started_again(tmp_path: Path) -> None:
    lines: list[str] = []
    supervisor = Supervisor(tmp_path, lines.append)
    supervisor.open()
    try:
        child = supervisor.add(python("print('hello', flush=True); import time; time.sleep(60)", respawn=True))
        await child.start()
        await eventually(lambda: "hello" in child.tail(), "its first line")
        pid = child.pid
        os.kill(pid, signal.SIGKILL)
        await eventually(lambda: child.running and child.pid != pid, "a new process")
        assert "service died (signal SIGKILL); its last log lines:\n    | hello\n  it is started again" in lines[0]
        await child.stop()
        assert child.returncode == -signal.SIGTERM
    finally:
        await supervisor.close()


async def test_who_ignores_sigterm_is_killed_with_its_children(tmp_path: Path) -> None:
    deaf = (
        "import signal, subprocess, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']);"
        "print('child', child.pid, flush=True); time.sleep(60)"
    )
    supervisor = Supervisor(tmp_path, lambda _line: None)
    supervisor.open()
    try:
        child = supervisor.add(python(deaf))
        await child.start()
        await eventually(lambda: child.tail().startswith("child "), "its child's number")
        grandchild = int(child.tail().split()[1])
        await child.stop()
        assert child.returncode == -signal.SIGKILL
        await eventually(lambda: not alive(grandchild), "the end of the grandchild")
    finally:
        await supervisor.close()


def alive(pid: int) -> bool:
    with suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


def python(code: str, *, respawn: bool = False) -> Spec:
    async def ready() -> bool:
        return True

    return Spec(
        name="service", command=(sys.executable, "-c", code), ready=ready, respawn=respawn,
        stop=((signal.SIGTERM, 0.3),),
    )  # fmt: skip


async def test_the_mail_sink_shows_what_arrived_and_misbehaves_on_request(root: Path) -> None:
    async with running(root, Topology(), durable=False) as stack, aiohttp.ClientSession(stack.urls.mail) as http:
        await send(stack.urls, "ada@example.com", html="<script>alert(1)</script><b>hi</b>")
        await send(stack.urls, "bob@example.com")

        async with http.get("/messages") as response:
            first, second = await response.json()
        assert set(first) == {"id", "to", "from", "subject", "headers", "text", "html"}
        assert first["to"] == ["ada@example.com"]
        assert (first["from"], first["subject"]) == ("from@example.com", "Grüße")
        assert (first["text"], second["html"]) == ("hello\n", None)
        assert "<b>hi</b>" in first["html"]
        assert first["headers"]["To"] == "ada@example.com"
        assert second["id"] > first["id"]
        async with http.get("/messages", params={"to": "bob@example.com"}) as response:
            assert [message["id"] for message in await response.json()] == [second["id"]]
        async with http.get(f"/messages/{first['id']}") as response:
            assert await response.json() == first
        async with http.get("/messages/404") as response:
            assert response.status == 404
        async with http.get("/") as response:
            page = await response.text()
            assert "<script>" not in page
            assert "iframe sandbox" in page

        faults = {"reply": "451 later", "times": 1, "to": "ada@example.com"}
        async with http.put("/faults", json=faults) as response:
            assert response.status == 204
        await send(stack.urls, "bob@example.com")
        with pytest.raises(aiosmtplib.SMTPDataError, match="later"):
            await send(stack.urls, "ada@example.com")
        await send(stack.urls, "ada@example.com")
        async with http.put("/faults", json={"drop_after_data": 1}) as response:
            assert response.status == 204
        with pytest.raises(aiosmtplib.SMTPServerDisconnected):
            await send(stack.urls, "ada@example.com")
        async with http.put("/faults", json={"reply": 5}) as response:
            assert response.status == 400
        async with http.get("/stats") as response:
            assert await response.json() == {"received": 5, "kept": 5, "refused": 1, "dropped": 1}
        async with http.delete("/messages") as response:
            assert response.status == 204
        async with http.get("/messages") as response:
            assert await response.json() == []


async def send(urls: Urls, to: str, html: str | None = None) -> None:
    message = EmailMessage()
    message["From"], message["To"], message["Subject"] = "from@example.com", to, "Grüße"
    message.set_content("hello")
    if html:
        message.add_alternative(html, subtype="html")
    port = int(urls.smtp.rsplit(":", 1)[1])
    await aiosmtplib.send(message, hostname="127.0.0.1", port=port, timeout=5)


def test_jars_are_planned_from_kafka_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if shutil.which("java") is None:
        pytest.skip("needs java")
    monkeypatch.delenv("DEVSTACK_BROKER", raising=False)
    monkeypatch.setenv("KAFKA_HOME", str(tmp_path))
    assert kafka.plan("auto").kind == "tansu"
    with pytest.raises(StackError, match="no jars"):
        kafka.plan("apache")
    (tmp_path / "libs").mkdir()
    (tmp_path / "libs" / "kafka_2.13-4.1.0.jar").touch()
    assert (kafka.plan("auto").kind, kafka.plan("auto").fetch) == ("apache", False)
