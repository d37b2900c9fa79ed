"""OpenAPI 3.1 from the table of routes; nothing is written twice."""

from collections.abc import Iterable, Sequence
from typing import Any, cast, get_origin

import msgspec

from shared import idempotency
from shared.application import Access, Route
from shared.errors import (
    Conflict,
    DeadlineExceeded,
    Forbidden,
    InvalidInput,
    Malformed,
    NotFound,
    Problem,
    RateLimited,
    TenfoldError,
    TooLarge,
    Unauthenticated,
    Unavailable,
    UnsupportedType,
)

_REF = "#/components/schemas/{name}"
_PROBLEM: dict[str, Any] = {
    "content": {"application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}}
}

_IDEMPOTENCY_KEY = {
    "name": idempotency.HEADER,
    "in": "header",
    "description": "Sent again with the same key and body within 24 hours, the request has no second effect and gets "
    "the first answer. With another body: 422. While the first is in progress: 409 with Retry-After.",
    "schema": {"type": "string", "minLength": 1, "maxLength": idempotency.MAX_LENGTH},
}


def document(title: str, version: str, routes: Sequence[Route]) -> dict[str, Any]:
    """The document of one service; every route of the table is in it."""
    types = list(_types(routes))
    schemas, components = msgspec.json.schema_components([*types, Problem], ref_template=_REF)
    by_type = dict(zip([repr(t) for t in types], schemas, strict=False))
    paths: dict[str, dict[str, Any]] = {}
    for route in routes:
        paths.setdefault(route.path, {})[route.method.lower()] = _operation(route, by_type, routes)
    return {
        "openapi": "3.1.0",
        "info": {"title": title, "version": version},
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer", "bearerFormat": "JWT"}},
        },
    }


def _types(routes: Iterable[Route]) -> Iterable[Any]:
    seen: set[str] = set()
    for route in routes:
        s = route.signature
        for type_ in (s.body, s.answer, *s.path.values()):
            if type_ is not None and type_ is not type(None) and repr(type_) not in seen:
                seen.add(repr(type_))
                yield type_


def _operation(route: Route, schemas: dict[str, Any], routes: Sequence[Route]) -> dict[str, Any]:
    signature = route.signature
    # A bound method's docstring is the summary: its first line, as everywhere.
    summary = (route.handler.__doc__ or route.handler.__name__.replace("_", " ")).strip().splitlines()[0]
    operation: dict[str, Any] = {"operationId": _operation_id(route), "summary": summary, "parameters": []}
    for name, type_ in signature.path.items():
        operation["parameters"].append({"name": name, "in": "path", "required": True, "schema": schemas[repr(type_)]})
    if signature.query is not None:
        operation["parameters"] += _query_parameters(signature.query)
    if route.idempotent:
        operation["parameters"].append(_IDEMPOTENCY_KEY)
    if signature.body is not None:
        operation["requestBody"] = {
            "required": True,
            "content": {"application/json": {"schema": schemas[repr(signature.body)]}},
        }
    elif route.consumes:
        operation["requestBody"] = {"required": True, "content": {type_: {} for type_ in route.consumes}}
    operation["responses"] = {
        **_success(route, schemas, _links(route, routes)),
        **{str(error.status): _problem(error) for error in sorted(_errors(route), key=lambda e: e.status)},
        "default": {"description": "A problem (RFC 9457)", **_PROBLEM},
    }
    if route.access in (Access.USER, Access.ADMIN):
        operation["security"] = [{"token": []}]
    elif route.access is Access.OPTIONAL:
        operation["security"] = [{}, {"token": []}]
    return operation


def _errors(route: Route) -> set[type[TenfoldError]]:
    """What any route of this kind may answer; what only its use case knows of is under `default`."""
    signature = route.signature
    errors: set[type[TenfoldError]] = {Malformed, RateLimited, Unavailable, DeadlineExceeded}
    if route.access is not Access.PUBLIC:
        errors.add(Unauthenticated)
    if route.access is Access.ADMIN:
        errors.add(Forbidden)
    if signature.path:
        errors.add(NotFound)
    if signature.query is not None:
        errors.add(InvalidInput)
    if signature.body is not None or route.consumes:
        errors |= {TooLarge, UnsupportedType, InvalidInput}
    if route.idempotent:
        errors |= {Conflict, InvalidInput}
    return errors


def _problem(error: type[TenfoldError]) -> dict[str, Any]:
    headers: dict[str, Any] = {}
    if error in (RateLimited, Unavailable):
        headers["Retry-After"] = {"description": "Seconds", "schema": {"type": "string", "pattern": "^[0-9]+$"}}
    if error is Unauthenticated:
        headers["WWW-Authenticate"] = {"schema": {"type": "string"}}
    return {"description": error.title, **({"headers": headers} if headers else {}), **_PROBLEM}


def _links(route: Route, routes: Sequence[Route]) -> dict[str, Any]:
    """What can be done with what `route` answers: its `id`, or that of its items, is the next name in other paths."""
    answer = route.signature.answer
    fields = getattr(get_origin(answer) or answer, "__struct_fields__", ())
    names = {"id": "$response.body#/id", "items": "$response.body#/items/0/id"}
    expression = next((names[name] for name in names if name in fields), None)
    links: dict[str, Any] = {}
    for other in routes if expression else ():
        following = other.path.removeprefix(f"{route.path}/").split("/")[0]
        if other.path.startswith(f"{route.path}/") and list(other.signature.path) == [following.strip("{}")]:
            pointer = other.path.replace("~", "~0").replace("/", "~1")
            links[_operation_id(other)] = {
                "operationRef": f"#/paths/{pointer}/{other.method.lower()}",
                "parameters": {following.strip("{}"): expression},
            }
    return links


def _success(route: Route, schemas: dict[str, Any], links: dict[str, Any]) -> dict[str, Any]:
    answer = route.signature.answer
    if answer is type(None):
        return {str(204 if route.status == 200 else route.status): {"description": "Done"}}
    content = {"application/json": {"schema": schemas[repr(answer)]}} if answer is not None else {"*/*": {}}
    return {str(route.status): {"description": "OK", "content": content, **({"links": links} if links else {})}}


def _query_parameters(type_: Any) -> list[dict[str, Any]]:
    _, components = msgspec.json.schema_components([type_], ref_template=_REF)
    schema = cast("dict[str, Any]", components[type_.__name__])
    required = schema.get("required", [])
    return [
        {"name": name, "in": "query", "required": name in required, "schema": property_}
        for name, property_ in schema["properties"].items()
    ]


def _operation_id(route: Route) -> str:
    return f"{route.handler.__name__}_{route.method.lower()}"
