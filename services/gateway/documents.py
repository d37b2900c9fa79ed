"""One OpenAPI document out of the services' own: what a service documents and the gateway passes on is in it."""

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec

from services.gateway.upstreams import Upstream
from shared.errors import DeadlineExceeded, Unavailable
from shared.http_client import ServiceClient
from shared.logs import get_logger

log = get_logger()

Document = Mapping[str, Any]

_REF = "#/components/schemas/"
_FETCH_SECONDS = 2.0
_FRESH_SECONDS = 60.0
_INCOMPLETE_SECONDS = 2.0


class Documents:
    """The merged document, fetched again every minute. A service that is down keeps the part it had before."""

    def __init__(
        self, own: Callable[[], Document], upstreams: Sequence[Upstream], clients: Mapping[str, ServiceClient]
    ) -> None:
        self._own = own
        self._upstreams = upstreams
        self._clients = clients
        self._parts: dict[str, Document] = {}
        self._merged: Document = {}
        self._fresh_until = float("-inf")
        self._lock = asyncio.Lock()

    async def merged(self) -> Document:
        async with self._lock:
            if time.monotonic() >= self._fresh_until:
                whole = all(await asyncio.gather(*(self._fetch(upstream) for upstream in self._upstreams)))
                # Through JSON, as the others came: what is equal must look equal.
                own = msgspec.json.decode(msgspec.json.encode(self._own()))
                self._merged = merge(own, [(u, self._parts[u.name]) for u in self._upstreams if u.name in self._parts])
                self._fresh_until = time.monotonic() + (_FRESH_SECONDS if whole else _INCOMPLETE_SECONDS)
            return self._merged

    async def _fetch(self, upstream: Upstream) -> bool:
        client = self._clients[upstream.name]
        try:
            self._parts[upstream.name] = await client.get(
                "/openapi.json", dict[str, Any], headers={}, timeout=_FETCH_SECONDS
            )
        except (Unavailable, DeadlineExceeded) as error:
            log.warning("document_not_fetched", upstream=upstream.name, error=str(error))
            return False
        return True


def merge(own: Document, parts: Sequence[tuple[Upstream, Document]]) -> Document:
    """`own` with the public paths and the schemas of `parts`. Where two services give one name to different schemas,
    the later one's is prefixed by its service."""
    paths: dict[str, Any] = {path: _labelled(item, "gateway") for path, item in own["paths"].items()}
    components = own.get("components", {})
    schemas: dict[str, Any] = dict(components.get("schemas", {}))
    security: dict[str, Any] = dict(components.get("securitySchemes", {}))
    for upstream, document in parts:
        components = document.get("components", {})
        theirs = components.get("schemas", {})
        names = {name: upstream.name.capitalize() + name for name in _colliding(schemas, theirs)}
        for name, schema in theirs.items():
            schemas[names.get(name, name)] = _renamed(schema, names)
        for path, item in document.get("paths", {}).items():
            if any(path == prefix or path.startswith(prefix + "/") for prefix in upstream.prefixes):
                paths[path] = _labelled(_renamed(item, names), upstream.name)
        security |= components.get("securitySchemes", {})
    return {
        **own,
        "servers": [{"url": "/"}],
        "tags": [{"name": "gateway"}, *({"name": upstream.name} for upstream, _ in parts)],
        "paths": dict(sorted(paths.items())),
        "components": {"schemas": dict(sorted(schemas.items())), "securitySchemes": security},
    }


def _colliding(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> set[str]:
    """Names that mean something else on each side: other schemas, or schemas that refer to such."""
    colliding = {name for name in theirs if name in ours and ours[name] != theirs[name]}
    while True:
        more = {n for n in theirs if n in ours and n not in colliding and _references(theirs[n]) & colliding}
        if not more:
            return colliding
        colliding |= more


def _references(node: Any) -> set[str]:
    if isinstance(node, Mapping):
        found = {n for value in node.values() for n in _references(value)}
        reference = node.get("$ref")
        return found | {reference.removeprefix(_REF)} if isinstance(reference, str) else found
    return {n for value in node for n in _references(value)} if isinstance(node, list) else set()


def _renamed(node: Any, names: Mapping[str, str]) -> Any:
    """`node` with its references to the keys of `names` led to the values."""
    if not names:
        return node
    if isinstance(node, Mapping):
        return {key: _renamed(value, names) for key, value in node.items()}
    if isinstance(node, list):
        return [_renamed(value, names) for value in node]
    if isinstance(node, str) and node.startswith(_REF):
        name = node.removeprefix(_REF)
        return _REF + names.get(name, name)
    return node


def _labelled(item: Mapping[str, Any], service: str) -> dict[str, Any]:
    """Operation ids are unique in a service; with its name in front they are so everywhere."""
    return {
        method: {**operation, "operationId": f"{service}_{operation.get('operationId', method)}", "tags": [service]}
        if isinstance(operation, Mapping)
        else operation
        for method, operation in item.items()
    }
