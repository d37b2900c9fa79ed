"""Prometheus metrics. Names: OpenTelemetry's where they exist, else `tenfold_<part>_<what>_<unit>`.

Label values are bounded: a route's template, never a path; no user ids. `labels()` costs more than the observation
itself, so hot paths keep their children (`child` caches them).
"""

from functools import cache
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, REGISTRY, Counter, Gauge, Histogram, generate_latest

__all__ = ["CONTENT_TYPE_LATEST", "Counter", "Gauge", "Histogram", "child", "exposition"]

# The buckets that OpenTelemetry's semantic conventions advise for request durations, in seconds.
DURATION_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10)

REQUEST_DURATION = Histogram(
    "http_server_request_duration_seconds",
    "Duration of HTTP requests",
    ("service", "http_request_method", "http_route", "http_response_status_code"),
    buckets=DURATION_BUCKETS,
)
HTTP_LIMIT = Gauge("tenfold_http_concurrency_limit_requests", "Requests that may be under way", ("service",))
HTTP_IN_FLIGHT = Gauge("tenfold_http_in_flight_requests", "Requests under way, streams not counted", ("service",))
HTTP_SHED = Counter("tenfold_http_shed_total", "Requests refused at once under overload", ("service",))
LOOP_LAG = Histogram(
    "tenfold_loop_lag_seconds",
    "How late the event loop runs a timer",
    buckets=(0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 5),
)


@cache
def child(metric: Any, *labels: str) -> Any:
    return metric.labels(*labels)


def exposition() -> bytes:
    """Everything measured so far in Prometheus' text format."""
    return generate_latest(REGISTRY)
