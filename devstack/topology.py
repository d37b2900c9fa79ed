"""How many of what: the one object that says which stage of the design runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Literal

from devstack.services import GATEWAY, KINDS, SERVICES, WITH_DATABASE

Broker = Literal["none", "auto", "apache", "tansu"]


@dataclass(frozen=True, kw_only=True)
class Topology:
    """The parts of a stack. With `one_process`, `instances` processes each run all the services (BUS=inline, without
    a broker); else every service has its own processes, and `processes` says how many of each kind (`media-worker`).
    `synchronous`: a commit waits until one replica has it. `pgbouncer`: a pooler before the PostgreSQL servers, for who
    asks for its URLs."""

    postgres_replicas: int = 0
    synchronous: bool = False
    pgbouncer: bool = False
    redis: int = 0
    broker: Broker = "none"
    one_process: bool = False
    instances: int = 0
    processes: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        counts = {each.name: getattr(self, each.name) for each in fields(self)} | dict(self.processes)
        for name, count in counts.items():
            if isinstance(count, int) and count < 0:
                raise ValueError(f"{name} must not be negative")
        if unknown := self.processes.keys() - set(KINDS):
            raise ValueError(f"there is no {min(unknown)}, but {', '.join(KINDS)}")
        if self.synchronous and not self.postgres_replicas:
            raise ValueError("synchronous needs a replica that commits wait for")
        if self.redis > 1:
            raise ValueError("redis is 0 or 1")
        if self.one_process:
            if self.instances < 1 or self.apart:
                raise ValueError("one_process needs instances >= 1 and no processes of single services")
            if self.broker != "none":
                raise ValueError("one_process runs with BUS=inline, so without a broker")
        elif self.instances:
            raise ValueError("instances is for one_process")
        elif self.apart and (
            self.broker == "none" or not all(self.processes.get(f"{service.name}-api") for service in SERVICES)
        ):
            raise ValueError("services in their own processes need a broker and at least one API process each")

    @property
    def apart(self) -> int:
        """How many processes of single services there are."""
        return sum(self.processes.values())

    @property
    def has_services(self) -> bool:
        return self.one_process or self.apart > 0

    @property
    def bus(self) -> Literal["inline", "kafka"]:
        return "inline" if self.broker == "none" else "kafka"

    @property
    def pools(self) -> int:
        """How many pools share the primary: one for each process and service with a database."""
        return len(WITH_DATABASE) * self.instances + self.apart - self.processes.get(f"{GATEWAY}-api", 0)

    @property
    def max_connections(self) -> int:
        """What PostgreSQL must allow: a pool of 10 each, and a reserve for tools and tests."""
        return max(100, 10 * self.pools + 30)

    @classmethod
    def stage(cls, number: int) -> Topology:
        """The design's stages that run without containers: 1 single server, 2 balanced, 3 cached, 4 queued."""
        match number:
            case 1:
                return cls(one_process=True, instances=1)
            case 2:
                return cls(one_process=True, instances=2, postgres_replicas=1)
            case 3:
                return cls(one_process=True, instances=2, postgres_replicas=1, redis=1)
            case 4:
                return cls(postgres_replicas=1, redis=1, broker="auto", processes=dict.fromkeys(KINDS, 1))
            case _:
                raise ValueError(f"there is no stage {number}: choose 1, 2, 3 or 4")

    @classmethod
    def backing(
        cls,
        *,
        replicas: int = 1,
        redis: int = 1,
        broker: Broker = "auto",
        synchronous: bool = False,
        pgbouncer: bool = False,
    ) -> Topology:
        """The servers only, no services."""
        return cls(postgres_replicas=replicas, redis=redis, broker=broker, synchronous=synchronous, pgbouncer=pgbouncer)
