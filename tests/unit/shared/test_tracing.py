import asyncio
import threading

import pytest
from opentelemetry.sdk.trace import TracerProvider

from shared import tracing


def test_a_flush_that_hangs_does_not_hold_the_process_up(monkeypatch: pytest.MonkeyPatch) -> None:
    release, ended = threading.Event(), threading.Event()

    def hang(_provider: TracerProvider) -> None:
        release.wait(30)
        ended.set()

    async def process() -> None:
        async with tracing.opened("test", None, 0.0):
            pass

    monkeypatch.setattr(TracerProvider, "shutdown", hang)
    monkeypatch.setattr(tracing, "_SHUTDOWN_SECONDS", 0.05)
    monkeypatch.setattr(tracing, "_tracer", tracing._tracer)
    with asyncio.Runner() as runner:
        runner.run(process())
    assert not ended.is_set()  # the runner has closed, and with it its executor
    release.set()
