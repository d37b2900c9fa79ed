"""OpenAPI 3.1 from the table of routes; nothing is written twice."""

from collections.abc import Iterable, Sequence
from typing import Any, cast

import msgspec

from shared.application import Access, Route
from shared.errors import Problem

_REF = "#/components/schemas/{name}"
_PROBLEM = {"content": {"application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}}}


def document(title: str, version: str, routes: Sequence[Route]) -> dict[str, Any]:
    """The document of one service; every route of the table is in it."""
    types = list(_types(routes))
    schemas, components = msgspec.json.schema_components([*types, Problem], ref_template=_REF)
    by_type = dict(zip([repr(t) for t in types], schemas, strict=False))
    paths: dict[str, dict[str, Any]] = {}
    for route in routes:
        paths.setdefault(route.path, {})[route.method.lower()] = _operation(route, by_type)
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


def _operation(route: Route, schemas: dict[str, Any]) -> dict[str, Any]:
    signature = route.signature
    # A bound method's docstring is the summary: its first line, as everywhere.
    summary = (route.handler.__doc__ or route.handler.__name__.replace("_", " ")).strip().splitlines()[0]
    operation: dict[str, Any] = {"operationId": _operation_id(route), "summary": summary, "parameters": []}
    for name, type_ in signature.path.items():
        operation["parameters"].append({"name": name, "in": "path", "required": True, "schema": schemas[repr(type_)]})
    if signature.query is not None:
        operation["parameters"] += _query_parameters(signature.query)
    if signature.body is not None:
        operation["requestBody"] = {
            "required": True,
            "content": {"application/json": {"schema": schemas[repr(signature.body)]}},
        }
    elif route.consumes:
        operation["requestBody"] = {"required": True, "content": {type_: {} for type_ in route.consumes}}
    operation["responses"] = {
        **_success(route, schemas),
        "default": {"description": "A problem (RFC 9457)", **_PROBLEM},
    }
    if route.access in (Access.USER, Access.ADMIN):
        operation["security"] = [{"token": []}]
    elif route.access is Access.OPTIONAL:
        operation["security"] = [{}, {"token": []}]
    return operation


def _success(route: Route, schemas: dict[str, Any]) -> dict[str, Any]:
    answer = route.signature.answer
    if answer is type(None):
        return {str(204 if route.status == 200 else route.status): {"description": "Done"}}
    content = {"application/json": {"schema": schemas[repr(answer)]}} if answer is not None else {"*/*": {}}
    return {str(route.status): {"description": "OK", "content": content}}


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
