"""PgBouncer in transaction mode, before the primary and each replica.

It is no wheel: the program is found in PGBOUNCER, on the PATH, or where Debian's package `pgbouncer` puts it
(`scripts/pgbouncer.sh` installs that). It asks the server for the roles' secrets, so a role made later can log in.
"""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Mapping

import asyncpg

from devstack.ports import free_port
from devstack.postgres import ADMIN, DATABASE, Place
from devstack.supervisor import ChildError, Spec, StackError, Supervisor

_POOL = 20


def program() -> str:
    """The program; `StackError` says how to get it."""
    found = os.environ.get("PGBOUNCER") or shutil.which("pgbouncer", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
    if not found:
        raise StackError("PgBouncer is not installed: run scripts/pgbouncer.sh, or name the program in PGBOUNCER")
    return found


class PgBouncer:
    """`servers` are the PostgreSQL ports by the name under which PgBouncer offers them as a database."""

    def __init__(self, supervisor: Supervisor, place: Place, admin_password: str, servers: Mapping[str, int]) -> None:
        self._supervisor = supervisor
        self._place = place
        self._admin_password = admin_password
        self._servers = servers
        self.port = 0

    def url(self, database: str, user: str, password: str) -> str:
        return f"postgresql://{user}:{password}@127.0.0.1:{self.port}/{database}"

    async def start(self) -> None:
        for last in (False, True):
            self.port = free_port()
            child = self._supervisor.add(self._spec())
            try:
                await child.start()
            except ChildError as error:
                if last or "already in use" not in error.tail:
                    raise
            else:
                return

    def _spec(self) -> Spec:
        folder = self._place.data
        users, config = folder / "pgbouncer-users.txt", folder / "pgbouncer.ini"
        databases = [f"{name} = host=127.0.0.1 port={port} dbname={DATABASE}" for name, port in self._servers.items()]
        settings = {
            "listen_addr": "127.0.0.1",
            "listen_port": self.port,
            "unix_socket_dir": "",
            "pool_mode": "transaction",
            "auth_type": "scram-sha-256",
            "auth_file": users,
            "auth_user": ADMIN,
            "default_pool_size": _POOL,
            "max_client_conn": 1000,
            # The default is two minutes, for which nobody waits.
            "query_wait_timeout": 5,
            "server_connect_timeout": 3,
            "server_login_retry": 1,
            "ignore_startup_parameters": "extra_float_digits",
        }
        texts = {
            users: f'"{ADMIN}" "{self._admin_password}"\n',
            config: "\n".join(["[databases]", *databases, "[pgbouncer]", *(f"{k} = {v}" for k, v in settings.items())]),
        }
        for path, text in texts.items():
            path.touch(mode=0o600)
            path.write_text(text)
            if self._place.user:
                os.chown(path, *self._place.user)

        async def ready() -> bool:
            url = self.url(next(iter(self._servers)), ADMIN, self._admin_password)
            try:
                connection = await asyncpg.connect(url, timeout=2.0, statement_cache_size=0)
            except (asyncpg.PostgresError, asyncpg.InterfaceError):
                return False
            await connection.close(timeout=2.0)
            return True

        return Spec(
            name="pgbouncer", command=(program(), str(config)), ready=ready, user=self._place.user,
            stop=((signal.SIGTERM, 2.0),),
        )  # fmt: skip
