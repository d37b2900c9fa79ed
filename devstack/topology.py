"""How many of what: the one object that says which stage of the design runs."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

Broker = Literal["none", "auto", "apache", "tansu"]


@dataclass(frozen=True, kw_only=True)
class Topology:
    """The parts of a stack. With `one_process`, `instances` processes each run all the services (BUS=inline, without
    a broker); else every service has its own processes and the counts below say how many. `synchronous`: a commit waits
    until one replica has it. `pgbouncer`: a pooler before the PostgreSQL servers, for who asks for its URLs."""

    postgres_replicas: int = 0
    synchronous: bool = False
    pgbouncer: bool = False
    redis: int = 0
    broker: Broker = "none"
    one_process: bool = False
    instances: int = 0
    gateway: int = 0
    users: int = 0
    media: int = 0
    notifier: int = 0
    media_workers: int = 0
    notifier_workers: int = 0

    def __post_init__(self) -> None:
        for field in fields(self):
            if isinstance(value := getattr(self, field.name), int) and value < 0:
                raise ValueError(f"{field.name} must not be negative")
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
        elif self.apart and (self.broker == "none" or not min(self.gateway, self.users, self.media, self.notifier)):
            raise ValueError("services in their own processes need a broker and at least one API process each")

    @property
    def apart(self) -> int:
        """How many processes of single services there are."""
        return self.gateway + self.users + self.media + self.notifier + self.media_workers + self.notifier_workers

    @property
    def has_services(self) -> bool:
        return self.one_process or self.apart > 0

    @property
    def bus(self) -> Literal["inline", "kafka"]:
        return "inline" if self.broker == "none" else "kafka"

    @property
    def pools(self) -> int:
        """How many pools share the primary: one for each process and service with a database."""
        return 3 * self.instances + self.apart - self.gateway

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
                return cls(
                    postgres_replicas=1, redis=1, broker="auto",
                    gateway=1, users=1, media=1, notifier=1, media_workers=1, notifier_workers=1,
                )  # fmt: skip
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
