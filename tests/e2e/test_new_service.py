"""`make service`: what it renders passes the project's own checks and tests, and is served through the gateway."""

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import yaml

from shared.ids import new_id
from shared.testing import eventually
from tests.e2e.conftest import Person

ROOT = Path(__file__).parents[2]
# Its own tests run on the broker that starts in a moment; nothing of a new service depends on which one it is.
ENVIRONMENT = os.environ | {"DEVSTACK_BROKER": "tansu"}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of this project, as it would be committed."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    copy = tmp_path_factory.mktemp("copy") / "project"
    for name in listed.splitlines():
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, copy / name)
    return copy


def run(project: Path, *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command], cwd=project, env=ENVIRONMENT, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["users"], "there is a service users already"),
        (["Orders"], "'Orders' is no name for a service"),
        (["class"], "'class' is no name for a service"),
        (["stock"], "what is one of stock called?"),
        (["../orders"], "is no name for a service"),
    ],
)
def test_what_is_no_name_is_refused_and_nothing_written(project: Path, arguments: list[str], reason: str) -> None:
    before = sorted(path.relative_to(project) for path in project.rglob("*"))
    refused = run(project, "scripts/new_service.py", *arguments)
    assert refused.returncode == 1
    assert reason in refused.stderr
    assert sorted(p.relative_to(project) for p in project.rglob("*") if "__pycache__" not in p.parts) == before


@pytest.fixture(scope="module")
def grown(project: Path) -> Path:
    """The project with a service more."""
    made = run(project, "scripts/new_service.py", "gadgets")
    assert made.returncode == 0, made.stderr
    assert "make test ARGS=tests/integration/gadgets" in made.stdout
    return project


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "command",
    [
        "ruff check .",
        "ruff format --check .",
        f"mypy --cache-dir {ROOT / '.mypy_cache'} -p services.gadgets -p tests.integration.gadgets",
        "pytest -q tests/contract tests/unit/gateway tests/integration/gadgets",
    ],
    ids=["ruff", "format", "mypy", "pytest"],
)
async def test_a_new_service_passes_the_checks(grown: Path, command: str) -> None:
    checked = await asyncio.to_thread(run, grown, "-m", *command.split())
    assert checked.returncode == 0, checked.stdout + checked.stderr
    compose = yaml.safe_load((grown / "docker-compose.yml").read_text())["services"]
    assert {"gadgets", "gadgets-worker", "gadgets-migrate"} <= set(compose)


async def test_a_new_service_answers_through_the_gateway(grown: Path, tmp_path: Path) -> None:
    async with running(grown, tmp_path) as gateway, aiohttp.ClientSession() as http:
        person = Person(gateway, http)
        await person.join()
        gadget = await person.post("/api/v1/gadgets", {"title": "first"}, idempotency_key=str(new_id()))
        assert (gadget.status, gadget.body["title"]) == (201, "first")
        assert (await person.get("/api/v1/gadgets")).body["items"] == [gadget.body]
        assert "/api/v1/gadgets" in (await person.get("/api/openapi.json")).body["paths"]
        assert (await person.call("DELETE", "/api/v1/users/me")).status == 202

        async def forgotten() -> bool:  # the token is still good, the account is not
            return bool((await person.get("/api/v1/gadgets")).body.get("items") == [])

        await eventually(forgotten, within=30)


@asynccontextmanager
async def running(project: Path, root: Path) -> AsyncIterator[str]:
    """The project on a single server, as `make dev STAGE=1` runs it; the gateway's URL."""
    command = ["-m", "devstack", "--stage", "1", "--data", str(root)]
    platform = await asyncio.create_subprocess_exec(sys.executable, *command, cwd=project, env=ENVIRONMENT)

    async def urls() -> Any:
        assert platform.returncode is None
        path = root / "urls.json"
        return json.loads(path.read_text()) if path.exists() else None

    try:
        yield (await eventually(urls, within=60))["gateway"]
    finally:
        if platform.returncode is None:
            platform.send_signal(signal.SIGINT)
        assert await asyncio.wait_for(platform.wait(), 15) == 0
