"""A real S3 server over HTTP: moto's, as a process of its own."""

import importlib.util
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

BUCKET = "tenfold"
# Only its interpreter is needed: it may live in an environment of its own, `MOTO_PYTHON`.
PYTHON = os.environ.get("MOTO_PYTHON") or (sys.executable if importlib.util.find_spec("moto") else None)
MISSING = "no S3 server: moto[server] is not installed, and MOTO_PYTHON names no interpreter that has it"
ENVIRON = {
    "AWS_ALLOW_HTTP": "true",
    "AWS_ACCESS_KEY_ID": "tenfold",
    "AWS_SECRET_ACCESS_KEY": "tenfold-secret",
    "AWS_REGION": "us-east-1",
}


@dataclass(frozen=True)
class S3Server:
    endpoint: str

    @property
    def environ(self) -> dict[str, str]:
        """With which a process finds it as `s3://tenfold`."""
        return {"AWS_ENDPOINT": self.endpoint, **ENVIRON}


@contextmanager
def serving(log: Path) -> Iterator[S3Server]:
    """The server, with an empty bucket."""
    assert PYTHON is not None
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    endpoint = f"http://127.0.0.1:{port}"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [PYTHON, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)], stdout=output, stderr=output
        )
    try:
        _make_bucket(f"{endpoint}/{BUCKET}")
        yield S3Server(endpoint)
    finally:
        process.kill()
        process.wait()


def _make_bucket(url: str) -> None:
    until = time.monotonic() + 30
    while True:
        try:
            with urllib.request.urlopen(urllib.request.Request(url, method="PUT"), timeout=5):
                return
        except urllib.error.URLError:
            if time.monotonic() > until:
                raise
            time.sleep(0.1)
