"""The stages, and what a topology refuses."""

import socket
from pathlib import Path

import pytest

from devstack.ports import free_port, free_ports
from devstack.services import KINDS, Service, discover
from devstack.topology import Topology


def test_each_stage_adds_one_thing() -> None:
    one, two, three, four = (Topology.stage(number) for number in (1, 2, 3, 4))

    assert (one.one_process, one.instances, one.postgres_replicas, one.redis, one.bus) == (True, 1, 0, 0, "inline")
    assert (two.one_process, two.instances, two.postgres_replicas, two.redis, two.bus) == (True, 2, 1, 0, "inline")
    assert (three.one_process, three.instances, three.postgres_replicas, three.redis) == (True, 2, 1, 1)
    assert (four.one_process, four.broker, four.bus, four.redis) == (False, "auto", "kafka", 1)
    assert four.processes == dict.fromkeys(KINDS, 1)
    assert all(stage.has_services for stage in (one, two, three, four))


def test_backing_has_no_services() -> None:
    backing = Topology.backing(replicas=2, broker="tansu")

    assert not backing.has_services
    assert (backing.postgres_replicas, backing.redis, backing.broker) == (2, 1, "tansu")


@pytest.mark.parametrize("number", [0, 5])
def test_unknown_stage(number: int) -> None:
    with pytest.raises(ValueError, match="choose 1, 2, 3 or 4"):
        Topology.stage(number)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"redis": 2}, "redis is 0 or 1"),
        ({"postgres_replicas": -1}, "postgres_replicas must not be negative"),
        ({"processes": {"media-worker": -1}}, "media-worker must not be negative"),
        ({"processes": {"media-wroker": 1}}, "there is no media-wroker, but .*media-worker"),
        ({"one_process": True}, "instances >= 1"),
        ({"one_process": True, "instances": 1, "processes": {"users-api": 1}}, "no processes of single services"),
        ({"one_process": True, "instances": 1, "broker": "auto"}, "without a broker"),
        ({"instances": 2}, "instances is for one_process"),
        ({"processes": {"gateway-api": 1, "users-api": 1, "media-api": 1, "notifier-api": 1}}, "need a broker"),
        ({"processes": {"gateway-api": 1}, "broker": "auto"}, "at least one API process each"),
    ],
)
def test_what_cannot_run_is_refused(arguments: dict[str, object], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        Topology(**arguments)  # type: ignore[arg-type]


def test_postgres_allows_the_pools_of_all_processes() -> None:
    processes = dict.fromkeys(KINDS, 4) | {"media-worker": 8, "notifier-worker": 2}
    big = Topology(broker="auto", processes=processes)

    assert big.max_connections >= 10 * (4 + 4 + 4 + 8 + 2)
    assert Topology.backing().max_connections == 100


def test_a_folder_is_a_service_and_its_files_say_what_it_has(tmp_path: Path) -> None:
    for path in ("gateway/app.py", "orders/app.py", "orders/consumers.py", "stock/app.py", "notes/readme"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).touch()
    (tmp_path / "orders" / "migrations").mkdir()

    found = discover(tmp_path)

    assert found == (Service("orders", True, True), Service("stock", False, False), Service("gateway", False, False))
    assert found[0].kinds == ("orders-api", "orders-worker")
    assert {"users-api", "media-worker", "gateway-api"} <= set(KINDS)


def test_free_ports_differ_and_can_be_bound() -> None:
    ports = free_ports(20)

    assert len(set(ports)) == 20
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", ports[0]))


def test_a_preferred_port_is_taken_only_when_free() -> None:
    preferred = free_port()
    assert free_port(preferred) == preferred
    with socket.create_server(("127.0.0.1", preferred)):
        assert free_port(preferred) != preferred
