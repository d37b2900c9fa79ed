"""What it costs to pass a request on: the gateway beside nginx, a plain aiohttp proxy and FastAPI with httpx.

    bench/setup.sh gateway && python bench/gateway.py [--rounds 3] [--seconds 4]

One run, rounds in turns, so that a busy machine is busy for all of them; everything on the loopback. CPU is the
process's own from /proc/<pid>/stat (nginx: its worker's), divided by the answers `wrk` counted. One process each.
"""

import argparse
import json
import os
import re
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import jwt
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from devstack import redis
from shared import auth
from shared.auth import Principal, Role
from shared.ids import new_id

ROOT = Path(__file__).resolve().parent.parent
PEERS = ROOT / "bench" / ".venv" / "bin" / "python"
PATH = "/api/v1/media"
OPEN_PATH = "/api/v1/unsubscribe/1"  # of which no token is looked at
_TICKS = os.sysconf("SC_CLK_TCK")

NGINX = """
daemon off; pid {root}/{name}.pid; error_log {root}/{name}.error warn; worker_processes 1;
events {{ worker_connections 4096; }}
http {{
  access_log {log}; keepalive_requests 100000000; client_body_temp_path {root}/{name}.body; proxy_temp_path {root}/{name}.proxy;
  fastcgi_temp_path {root}/{name}.f; uwsgi_temp_path {root}/{name}.u; scgi_temp_path {root}/{name}.s;
  upstream service {{ server 127.0.0.1:{upstream}; keepalive 128; keepalive_requests 100000000; }}
  server {{ listen 127.0.0.1:{port}; {locations} }}
}}
"""  # noqa: E501
PROXYING = 'location / { proxy_pass http://service; proxy_http_version 1.1; proxy_set_header Connection ""; }'


@dataclass
class Subject:
    name: str
    port: int
    pid: int
    path: str = PATH
    costs: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


@contextmanager
def running(command: list[str], port: int, environ: dict[str, str], output: Path) -> Iterator[int]:
    with output.open("wb") as sink:
        process = subprocess.Popen(command, env=os.environ | environ, stdout=sink, stderr=subprocess.STDOUT, cwd=ROOT)
    try:
        until = time.monotonic() + 20
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                if process.poll() is not None or time.monotonic() > until:
                    raise SystemExit(f"{command[0]} did not start:\n{output.read_text()[-2000:]}") from None
                time.sleep(0.05)
        yield process.pid
    finally:
        process.terminate()
        process.wait(30)


@contextmanager
def nginx(root: Path, name: str, port: int, upstream: int, locations: str, log: str = "off") -> Iterator[int]:
    conf = root / f"{name}.conf"
    conf.write_text(NGINX.format(root=root, name=name, port=port, upstream=upstream, locations=locations, log=log))
    with running(["nginx", "-c", str(conf), "-p", str(root)], port, {}, root / f"{name}.out") as master:
        while not (children := Path(f"/proc/{master}/task/{master}/children").read_text().split()):
            time.sleep(0.05)  # it listens before it has its worker
        yield int(children[0])


def wrk(port: int, path: str, seconds: float, token: str, connections: int) -> tuple[int, float]:
    """How many were answered, and how many a second."""
    out = subprocess.run(
        ["wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "-H", f"Authorization: Bearer {token}",
         f"http://127.0.0.1:{port}{path}"],
        capture_output=True, text=True, check=True, timeout=seconds + 30,
    ).stdout  # fmt: skip
    if "Non-2xx" in out or "Socket errors" in out:
        raise SystemExit(f"not all answers were good:\n{out}")
    count, rate = re.search(r"(\d+) requests in", out), re.search(r"Requests/sec:\s+([\d.]+)", out)
    assert count is not None
    assert rate is not None
    return int(count[1]), float(rate[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=int, default=4)
    parser.add_argument("--connections", type=int, default=32)
    parser.add_argument("--only", help="subjects whose names hold this", default="")
    given = parser.parse_args()
    for program in ("nginx", "wrk"):
        if shutil.which(program) is None:
            raise SystemExit(f"{program} is missing: run bench/setup.sh gateway")
    if not PEERS.exists():
        raise SystemExit("the peers are missing: run bench/setup.sh gateway")
    with ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        root.chmod(0o755)
        key = Ed25519PrivateKey.generate()
        jwk = jwt.algorithms.OKPAlgorithm.to_jwk(key.public_key(), as_dict=True) | {"kid": "bench", "alg": "EdDSA"}
        now = int(time.time())
        token = auth.issue(Principal(new_id(), new_id(), Role.USER, now + 3600), "bench", key, now)
        subjects = start(stack, root, json.dumps({"keys": [jwk]}))
        subjects = [s for s in subjects if given.only in s.name or s.name == "nginx"]
        for subject in subjects:
            request = urllib.request.Request(  # also fetches the keys
                f"http://127.0.0.1:{subject.port}{subject.path}", headers={"Authorization": f"Bearer {token}"}
            )
            urllib.request.urlopen(request, timeout=5).read()
        for _ in range(given.rounds):
            for subject in subjects:
                before = cpu_seconds(subject.pid)
                count, rate = wrk(subject.port, subject.path, given.seconds, token, given.connections)
                subject.costs.append((cpu_seconds(subject.pid) - before) / count * 1e6)
                subject.rates.append(rate)
    report(subjects, given)


def start(stack: ExitStack, root: Path, jwks: str) -> list[Subject]:
    (root / "jwks.json").write_text(jwks)
    upstream = free_port()
    locations = (
        f"location = /.well-known/jwks.json {{ alias {root}/jwks.json; }} "
        'location / { default_type application/json; return 200 \'{"items": [], "next_cursor": null}\'; }'
    )
    stack.enter_context(nginx(root, "upstream", upstream, upstream, locations))
    subjects = []
    for name, log in (("nginx", "off"), ("nginx, access log", f"{root}/access.log")):
        port = free_port()
        subjects.append(Subject(name, port, stack.enter_context(nginx(root, name[-3:], port, upstream, PROXYING, log))))
    cache = free_port()
    command = [redis.binary(), "--port", str(cache), "--bind", "127.0.0.1", "--save", "", "--dir", str(root)]
    stack.enter_context(running(command, cache, {}, root / "redis.out"))
    base = f"http://127.0.0.1:{upstream}"
    common = {f"UPSTREAM_{name}": base for name in ("USERS", "MEDIA", "NOTIFIER")} | {
        "JWKS_URL": f"{base}/.well-known/jwks.json", "LIMIT_DEFAULT": "10000000/60", "HOST": "127.0.0.1",
        "DRAIN_SECONDS": "0", "SHUTDOWN_SECONDS": "1",
    }  # fmt: skip
    everything = {"REDIS_URL": f"redis://127.0.0.1:{cache}/0"}
    for name, path, module, environ in (
        ("gateway: token, limit in Redis, metrics, log", PATH, "services.gateway", everything),
        ("gateway: without any of these", OPEN_PATH, "bench.bare_gateway", {"LOG_LEVEL": "warning"}),
    ):
        port = free_port()
        own = common | environ | {"PORT": str(port), "ADMIN_PORT": str(free_port())}
        command = [sys.executable, "-m", module]
        pid = stack.enter_context(running(command, port, own, root / f"gateway-{len(environ)}{port}.out"))
        subjects.append(Subject(name, port, pid, path))
    for name, kind, python in (
        ("plain aiohttp proxy", "aiohttp", sys.executable),
        ("FastAPI + httpx", "fastapi", str(PEERS)),
    ):
        port = free_port()
        command = [python, str(ROOT / "bench" / "peers.py"), kind, str(port), base]
        subjects.append(Subject(name, port, stack.enter_context(running(command, port, {}, root / f"{kind}.out"))))
    return subjects


def report(subjects: list[Subject], given: argparse.Namespace) -> None:
    least = statistics.median(subjects[0].costs)
    lines = [
        "# What passing a request on costs",
        "",
        f"`make bench-gateway`: {given.rounds} rounds in turns of {given.seconds} s, {given.connections} connections,",
        f"one process each, {os.cpu_count()} cores shared with wrk and the service, load {os.getloadavg()[0]:.0f}.",
        f"Python {sys.version.split()[0]}. Medians; the least and the most.",
        "",
        "| | CPU us a request | times nginx | requests a second |",
        "|---|---|---|---|",
    ]
    for s in subjects:
        cost = statistics.median(s.costs)
        lines.append(
            f"| {s.name} | {cost:.0f} ({min(s.costs):.0f} to {max(s.costs):.0f}) | {cost / least:.1f} "
            f"| {statistics.median(s.rates):,.0f} |"
        )
    text = "\n".join(lines) + "\n"
    print(text)
    if not given.only:
        (ROOT / "bench" / "results" / "gateway.md").write_text(text)


if __name__ == "__main__":
    main()
