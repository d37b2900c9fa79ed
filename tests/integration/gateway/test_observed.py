"""What a request that is passed on leaves behind in log and traces."""

from typing import Any

import aiohttp
import pytest
from aiohttp import web
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind

from shared import tracing
from shared.testing import eventually
from tests.integration.gateway.conftest import AccessLog, World

PATH = "/api/v1/media/1/original"  # open to anybody
GIVEN = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


async def traceparent(request: web.Request) -> web.Response:
    return web.Response(text=request.headers["traceparent"], status=203)


async def test_one_line_in_the_log(world: World, http: aiohttp.ClientSession, access_log: AccessLog) -> None:
    door = await world.in_front_of(traceparent)
    async with http.get(f"{door}{PATH}?secret=1", headers={"X-Request-Id": "abcdefgh"}) as answer:
        arrived = await answer.text()

    (line,) = [line for line in await eventually(access_log) if line["service"] == "gateway"]
    assert line.pop("milliseconds") >= 0
    assert line.pop("timestamp").endswith("Z")
    assert line == {
        "service": "gateway",
        "event": "request",
        "level": "info",
        "request_id": "abcdefgh",
        "trace_id": arrived[3:35],
        "method": "GET",
        "route": "/api/v1/media/...",
        "status": 203,
    }


async def test_a_sampled_request_has_a_span_that_the_service_is_told_of(
    world: World, http: aiohttp.ClientSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    door, spans, provider = await world.in_front_of(traceparent), InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(spans))
    monkeypatch.setattr(tracing, "_tracer", provider.get_tracer("test"))
    monkeypatch.setattr(tracing, "_ratio", 1.0)
    async with http.get(f"{door}{PATH}", headers={"traceparent": GIVEN}) as answer:
        arrived = await answer.text()

    async def finished() -> list[Any]:
        return [span for span in spans.get_finished_spans() if span.name == "GET /api/v1/media/..."]

    (span,) = await eventually(finished)
    assert span.kind is SpanKind.SERVER
    assert span.attributes["http.response.status_code"] == 203
    assert arrived == f"00-{span.context.trace_id:032x}-{span.context.span_id:016x}-01"
    assert GIVEN[:-3] == f"00-{span.parent.trace_id:032x}-{span.parent.span_id:016x}"
