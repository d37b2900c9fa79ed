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


GIVEN = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-0"


@pytest.mark.parametrize("flag", ["0", "1"])
async def test_the_callers_trace_travels_on_where_none_is_exported(flag: str) -> None:
    async with tracing.opened("test", None, 1.0):
        with tracing.span("a", parent=tracing.extract({"traceparent": GIVEN + flag})) as span:
            assert not span.is_recording()
            with tracing.span("b"):
                assert tracing.traceparent() == GIVEN + flag
                assert tracing.trace_id() == GIVEN[3:35]
    assert tracing.traceparent() is None


@pytest.mark.parametrize("given", ["", "x", GIVEN + "z", "00-" + "0" * 32 + GIVEN[35:] + "1"])
async def test_a_new_trace_is_begun_where_the_caller_has_none(given: str) -> None:
    async with tracing.opened("test", None, 1.0):
        with tracing.span("a", parent=tracing.extract({"traceparent": given})):
            assert tracing.extract({"traceparent": tracing.traceparent() or ""}) != ""
            assert tracing.trace_id() != GIVEN[3:35]


async def test_the_callers_choice_counts_before_chance() -> None:
    # The collector is away, which costs nothing but the spans.
    async with tracing.opened("test", "http://127.0.0.1:1", 1.0):
        for flag, recording in (("0", False), ("1", True)):
            with tracing.span("a", parent=GIVEN + flag) as span, tracing.span("b") as below:
                assert (span.is_recording(), below.is_recording()) == (recording, recording)
                assert (tracing.traceparent() or "")[:35] == GIVEN[:35]
        with tracing.span("new", parent="") as span:
            assert span.is_recording()


async def test_traces_have_different_ids() -> None:
    async with tracing.opened("test", None, 1.0):
        made = [tracing.unsampled("") or "" for _ in range(100)]
    assert [tracing.extract({"traceparent": given}) for given in made] == made
    assert len({given[3:35] for given in made}) == len({given[36:52] for given in made}) == 100
