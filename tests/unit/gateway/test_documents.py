from typing import Any

from services.gateway.documents import merge
from services.gateway.upstreams import Upstream

OWN = {"openapi": "3.1.0", "info": {"title": "Tenfold", "version": "1"}, "paths": {}, "components": {"schemas": {}}}
USERS, MEDIA = Upstream("users", ("/api/v1/users",)), Upstream("media", ("/api/v1/media",))


def reference(name: str) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{name}"}


def part(path: str, **schemas: Any) -> dict[str, Any]:
    operation = {"operationId": "list_get", "responses": {"200": {"schema": reference("Page")}}}
    return {"paths": {path: {"get": operation}, "/internal": {"get": operation}}, "components": {"schemas": schemas}}


def test_equal_schemas_are_shared_and_others_are_renamed_with_what_refers_to_them() -> None:
    problem, page = {"type": "object"}, {"items": reference("Item")}
    document = merge(
        OWN,
        [
            (USERS, part("/api/v1/users", Problem=problem, Page=page, Item={"type": "string"})),
            (MEDIA, part("/api/v1/media", Problem=problem, Page=page, Item={"type": "integer"})),
        ],
    )
    assert document["components"]["schemas"] == {
        "Problem": problem,
        "Item": {"type": "string"},
        "Page": page,
        "MediaItem": {"type": "integer"},
        "MediaPage": {"items": reference("MediaItem")},
    }
    users, media = (document["paths"][path]["get"] for path in ("/api/v1/users", "/api/v1/media"))
    assert users["responses"]["200"]["schema"] == reference("Page")
    assert media["responses"]["200"]["schema"] == reference("MediaPage")
    assert (users["operationId"], media["operationId"]) == ("users_list_get", "media_list_get")


def test_only_public_paths_are_taken() -> None:
    assert set(merge(OWN, [(USERS, part("/api/v1/users"))])["paths"]) == {"/api/v1/users"}
