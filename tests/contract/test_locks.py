"""What `pyproject.toml` asks for is locked: images and environments are installed from the locks alone."""

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
RUNTIME: list[str] = PROJECT["project"]["dependencies"]
DEVELOPMENT: list[str] = [one for one in PROJECT["dependency-groups"]["dev"] if isinstance(one, str)]


def _name(requirement: str) -> str:
    match = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert match is not None
    return re.sub(r"[-_.]+", "-", match[0]).lower()


@pytest.mark.parametrize(
    ("lock", "asked"),
    [("requirements.lock", RUNTIME), ("requirements-dev.lock", RUNTIME + DEVELOPMENT)],
)
def test_every_dependency_is_locked(lock: str, asked: list[str]) -> None:
    locked = set(re.findall(r"^([a-z0-9.-]+)==", (ROOT / lock).read_text(), re.MULTILINE))
    missing = {_name(one) for one in asked} - locked
    assert not missing, f"{lock} lacks {', '.join(sorted(missing))}: run make lock"
