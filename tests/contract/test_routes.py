"""What holds for the URL tables of all services."""

import importlib
import inspect

import pytest

from shared import openapi
from shared.application import Access, Route
from tests.contract.declared import SERVICES
from tests.e2e.endpoints import ENDPOINTS

NAMES = sorted(path.parent.name for path in SERVICES.glob("*/routes.py"))
# docs/adr/0020: they hand out secrets, only have mail sent, or may well be done twice.
WITHOUT_KEY = {
    "/api/v1/sessions",
    "/api/v1/sessions/refresh",
    "/api/v1/email-verifications",
    "/api/v1/media/uploads/{upload_id}/complete",
    "/api/v1/password-resets",
    "/api/v1/webhooks/{webhook_id}/deliveries/{delivery_id}/redeliver",
}


def table(service: str) -> list[Route]:
    handlers = importlib.import_module(f"services.{service}.handlers").Handlers
    found: list[Route] = importlib.import_module(f"services.{service}.routes").routes(handlers.__new__(handlers))
    return found


@pytest.mark.parametrize("service", NAMES)
def test_every_post_that_creates_takes_an_idempotency_key(service: str) -> None:
    for route in table(service):
        creates = route.method == "POST" and route.status in (201, 202) and route.path not in WITHOUT_KEY
        takes = "call.once" in inspect.getsource(route.handler)
        assert (route.idempotent, takes) == (creates, creates), route.path
        operation = openapi.document(service, "1", [route])["paths"][route.path][route.method.lower()]
        assert ("Idempotency-Key" in {p["name"] for p in operation["parameters"]}) is creates


@pytest.mark.parametrize("service", NAMES)
def test_operations_have_names_of_their_own(service: str) -> None:
    operations = [o for item in openapi.document(service, "1", table(service))["paths"].values() for o in item.values()]
    names = [operation["operationId"] for operation in operations]
    assert len(names) == len(set(names)) == len(table(service))


def test_every_endpoint_has_its_refusals_tested() -> None:
    """The table of the tests names what each route can refuse for, as its declaration says."""
    expected = {f"{route.method} {route.path}": refusals(route) for name in NAMES for route in table(name)}
    assert {endpoint: set(line.refuses) for endpoint, line in ENDPOINTS.items()} == expected


def refusals(route: Route) -> set[int]:
    signature = route.signature
    found = {401} if route.access in (Access.USER, Access.ADMIN) else set()
    found |= {403} if route.access is Access.ADMIN else set()
    found |= {404} if signature.path else set()
    found |= {412} if "call.expected_version" in inspect.getsource(route.handler) else set()
    takes = signature.body is not None or signature.query is not None or (route.consumes and route.method == "POST")
    return found | ({422} if takes else set())
