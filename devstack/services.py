"""Which services there are, told by the files of their folders: a new folder is a new service, in every stage."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

GATEWAY = "gateway"
_FOLDER = Path(__file__).resolve().parent.parent / "services"


@dataclass(frozen=True)
class Service:
    """`app.py` makes a folder a service, `migrations/` gives it a database, `consumers.py` a worker."""

    name: str
    database: bool
    worker: bool

    @property
    def kinds(self) -> tuple[str, ...]:
        """Its kinds of process, as a topology counts them: `media-api`, `media-worker`."""
        return (f"{self.name}-api", f"{self.name}-worker") if self.worker else (f"{self.name}-api",)


def discover(folder: Path = _FOLDER) -> tuple[Service, ...]:
    """By name; the gateway last, since its door opens when the others listen."""
    found = [
        Service(path.parent.name, (path.parent / "migrations").is_dir(), (path.parent / "consumers.py").exists())
        for path in folder.glob("*/app.py")
    ]
    return tuple(sorted(found, key=lambda service: (service.name == GATEWAY, service.name)))


SERVICES = discover()
WITH_DATABASE = tuple(service.name for service in SERVICES if service.database)
KINDS = tuple(kind for service in SERVICES for kind in service.kinds)
