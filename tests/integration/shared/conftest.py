import socket
from collections.abc import AsyncIterator, Iterator

import pytest

from shared.redis import Redis
from tests.backing import Backing


@pytest.fixture
async def redis(backing: Backing) -> AsyncIterator[Redis]:
    """Patient, for a busy machine's Redis may be slow."""
    async with Redis.opened(backing.redis, call_seconds=5) as opened:
        yield opened


@pytest.fixture
def black_hole() -> Iterator[str]:
    """A port that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"redis://127.0.0.1:{server.getsockname()[1]}/0"


@pytest.fixture(params=["refused", "black hole"])
async def dead_redis(request: pytest.FixtureRequest, black_hole: str) -> AsyncIterator[Redis]:
    async with Redis.opened(black_hole if request.param == "black hole" else "redis://127.0.0.1:1/0") as opened:
        yield opened
