"""`make service NAME=orders [ITEM=order]`: a new service from `templates/`, and its lines wherever services stand.

    services/NAME, tests/integration/NAME     the service and its tests
    services/gateway/upstreams.py             its prefix at the gateway
    docker-compose.yml, helm/tenfold/values.yaml
    tests/e2e/endpoints.py, test_refusals.py  how its endpoints refuse

Everything else finds services by their folders. Refuses names that are taken or are not plain, and writes nothing then.
"""

import argparse
import keyword
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

ROOT = Path(__file__).resolve().parent.parent
TEMPLATES = ROOT / "templates"
_NAME = re.compile(r"[a-z][a-z0-9]{1,30}")
_RESERVED = {"public", "postgres", "services", "shared", "tests"}

# Where a block of templates/blocks.jinja goes: the file, the block, and a pattern for the line that it stands before.
PLACES = (
    ("services/gateway/upstreams.py", "upstream", r"^\)\n\n# The first that matches counts"),
    ("docker-compose.yml", "anchor", r"^# A process starts when what it stands on answers"),
    ("docker-compose.yml", "compose_upstream", r"^      TRUSTED_PROXIES: "),
    ("docker-compose.yml", "compose_health", r"^    deploy: \{<<: \*small, replicas"),
    ("docker-compose.yml", "processes", r"^  # Roles and schemas, then each service's own migrations"),
    ("docker-compose.yml", "bootstrap", r"(?<=_DATABASE_PASSWORD}\n)    depends_on: \{postgres:"),
    ("docker-compose.yml", "migrate", r"^  postgres:\n    <<:"),
    ("docker-compose.yml", "migrated", r"(?<=^      SERVICES: users)"),
    ("helm/tenfold/values.yaml", "called", r"(?<=^    calls: \[users)(?=, [\w, ]+\]\n    public: true)"),
    ("helm/tenfold/values.yaml", "chart_upstream", r"^      TRUSTED_PROXIES: "),
    ("helm/tenfold/values.yaml", "chart_service", r"^autoscaling:\n"),
    ("tests/e2e/endpoints.py", "endpoints", r"^}\n"),
    ("tests/e2e/test_refusals.py", "hers", r'^        "user_id": NOBODY,'),
)


def environment() -> Environment:
    return Environment(loader=FileSystemLoader(TEMPLATES), undefined=StrictUndefined, keep_trailing_newline=True)


def rendered(name: str, variables: dict[str, object]) -> Iterator[tuple[Path, str]]:
    """The files of the service and of its tests."""
    jinja = environment()
    for template in jinja.list_templates(filter_func=lambda path: path.startswith("service/")):
        path = Path(template.removeprefix("service/").removesuffix(".jinja").replace("NAME", name))
        of_tests = path.parts[0] == "tests"
        folder = ROOT / "tests/integration" / name if of_tests else ROOT / "services" / name
        yield folder / path.relative_to("tests" if of_tests else ""), jinja.get_template(template).render(variables)


def edited(variables: dict[str, object]) -> Iterator[tuple[Path, str]]:
    """The files that name every service, with this one. Raises `SystemExit` where a place is not found."""
    blocks = environment().get_template("blocks.jinja").make_module(variables)
    texts = {path: (ROOT / path).read_text() for path, _, _ in PLACES}
    for path, block, pattern in PLACES:
        places = list(re.finditer(pattern, texts[path], re.MULTILINE))
        if len(places) != 1:
            raise SystemExit(f"nothing was written: {path} has {len(places)} places for its {block}, not one")
        at = places[0].start()
        texts[path] = texts[path][:at] + getattr(blocks, block)() + texts[path][at:]
    for path, text in texts.items():
        yield ROOT / path, text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="the service, its schema and its path: a plural, such as orders")
    parser.add_argument("item", nargs="?", help="one of them; by default the name without its last s")
    given = parser.parse_args()
    name, item = given.name, given.item or given.name.removesuffix("s")
    for word in (name, item):
        if not _NAME.fullmatch(word) or keyword.iskeyword(word) or word in _RESERVED:
            raise SystemExit(f"{word!r} is no name for a service: lower case letters and digits, no keyword")
    if item == name:
        raise SystemExit(f"what is one of {name} called? make service NAME={name} ITEM=...")
    if (ROOT / "services" / name).exists():
        raise SystemExit(f"there is a service {name} already")
    settings = "".join(path.read_text() for path in ROOT.glob("services/*/settings.py"))
    port = max(int(port) for port in re.findall(r"port: int = (80[0-7]\d)", settings)) + 1
    variables = {"name": name, "Name": name.title(), "item": item, "Item": item.title(), "port": port}
    for path, text in [*rendered(name, variables), *edited(variables)]:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    folders = [f"services/{name}", f"tests/integration/{name}"]
    for command in (
        ["ruff", "check", "--fix", "--quiet", "--select", "I", *folders],
        ["ruff", "format", "--quiet", *folders],
        ["tests.contract.test_events"],
        ["tests.contract.asyncapi"],
    ):
        subprocess.run([sys.executable, "-m", *command], cwd=ROOT, check=True)
    print(f"""\
services/{name} is there, with tests in tests/integration/{name}. Next:
  make check
  make test ARGS=tests/integration/{name}
  make dev                          # and /api/v1/{name} answers
Its columns are in services/{name}/migrations, its limits and open routes in services/gateway/upstreams.py.""")


if __name__ == "__main__":
    main()
