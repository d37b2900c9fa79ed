"""Whether a change of an event's JSON Schema could break who consumes it, now and in the history of the repository."""

import json
import os
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

# What says nothing of the values.
_ANNOTATIONS = {"$defs", "$id", "$schema", "title", "description", "default", "examples", "required", "properties"}


def incompatibilities(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What a consumer of `old` would miss in `new`: a field removed, retyped or not always there, at any depth."""
    return list(_compare(old, new, old, new, ""))


def _compare(
    old: Mapping[str, Any], new: Mapping[str, Any], old_root: Mapping[str, Any], new_root: Mapping[str, Any], at: str
) -> Iterator[str]:
    old, new = _resolved(old, old_root), _resolved(new, new_root)
    if "anyOf" in old or "anyOf" in new:
        known = old.get("anyOf", [old])
        for choice in new.get("anyOf", [new]):
            if all(list(_compare(before, choice, old_root, new_root, at)) for before in known):
                yield f"{at or 'the event'} was retyped"
        return
    if _constraints(old) != _constraints(new) or not set(new.get("enum", ())) <= set(
        old.get("enum", new.get("enum", ()))
    ):
        yield f"{at or 'the event'} was retyped"
        return
    if "items" in old:
        yield from _compare(old["items"], new.get("items", {}), old_root, new_root, f"{at}[]")
    for name, schema in old.get("properties", {}).items():
        path = f"{at}.{name}" if at else name
        if name not in new.get("properties", {}):
            yield f"{path} was removed"
            continue
        yield from _compare(schema, new["properties"][name], old_root, new_root, path)
        if name in old.get("required", ()) and name not in new.get("required", ()):
            yield f"{path} is not always there any more"


def _resolved(schema: Mapping[str, Any], root: Mapping[str, Any]) -> Mapping[str, Any]:
    if "$ref" not in schema:
        return schema
    found: Mapping[str, Any] = root["$defs"][schema["$ref"].removeprefix("#/$defs/")]
    return found


def _constraints(schema: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in schema.items() if name not in _ANNOTATIONS | {"items", "enum"}}


def broken_since(root: Path) -> dict[str, list[str]]:
    """The faults of every schema under `root` against what was committed and released, by revision and file.

    Looked at are the last commit, the one before (on a pull request that is the branch it goes to) and every release,
    as far as this clone has them.
    """
    faults: dict[str, list[str]] = {}
    for revision in ("HEAD", "HEAD^", *_git(root, "tag", "--list", "v*").splitlines()):
        for path in _git(root, "ls-tree", "-r", "--name-only", revision, "services").splitlines():
            if Path(path).parent.name != "schemas" or not path.endswith(".json"):
                continue
            now = root / path
            old = json.loads(_git(root, "show", f"{revision}:{path}"))
            found = incompatibilities(old, json.loads(now.read_text())) if now.exists() else ["the event was removed"]
            if found:
                faults[f"{revision}:{path}"] = found
    return faults


def _git(root: Path, *arguments: str) -> str:
    """What git answers; nothing where there is no such revision, no repository or no git."""
    elsewhere = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}  # a hook's
    try:
        return subprocess.run(
            ["git", *arguments], cwd=root, env=elsewhere, capture_output=True, text=True, check=True
        ).stdout
    except (subprocess.CalledProcessError, FileNotFoundError):
        return ""
