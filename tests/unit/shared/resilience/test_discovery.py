from collections.abc import Sequence
from dataclasses import dataclass

from shared.resilience import Instances
from shared.resilience.discovery import Follower


@dataclass(eq=False)
class Member:
    url: str
    in_flight: int = 0
    retired: bool = False
    closed: bool = False

    def retire(self) -> None:
        self.retired = True

    def close(self) -> None:
        self.closed = True


class Names:
    """A name server that can be away."""

    def __init__(self, **answers: list[str]) -> None:
        self.answers = answers

    async def __call__(self, host: str) -> Sequence[str]:
        if host not in self.answers:
            raise OSError("no such name")
        return self.answers[host]


class World:
    def __init__(self, names: Names, *urls: str) -> None:
        self.instances: Instances[Member] = Instances()
        self.made: list[Member] = []
        self.follower = Follower(urls, self.instances, self._make, names)

    def _make(self, url: str) -> Member:
        self.made.append(Member(url))
        return self.made[-1]

    @property
    def urls(self) -> set[str]:
        found = {member.url for _ in range(200) if (member := self.instances.choose())}
        assert len(found) == len(self.instances)
        return found


async def test_a_list_stays_as_it_is() -> None:
    world = World(Names(), "http://10.0.0.1:8000/", "http://users:8000")
    async with world.follower.following():
        assert world.urls == {"http://10.0.0.1:8000", "http://users:8000"}
    assert all(member.closed for member in world.made)


async def test_every_address_of_a_name_is_an_instance() -> None:
    names = Names(users=["10.0.0.1", "fd00::1"])
    world = World(names, "dns+http://users:8000/base", "http://10.9.9.9:1")
    async with world.follower.following():
        assert world.urls == {"http://10.0.0.1:8000/base", "http://[fd00::1]:8000/base", "http://10.9.9.9:1"}


async def test_instances_come_and_go_with_their_addresses() -> None:
    names = Names(users=["10.0.0.1", "10.0.0.2"])
    world = World(names, "dns+http://users:8000")
    await world.follower.look()
    kept = world.made[1]
    names.answers["users"] = ["10.0.0.2", "10.0.0.3"]
    await world.follower.look()
    assert world.urls == {"http://10.0.0.2:8000", "http://10.0.0.3:8000"}
    assert [member.retired for member in world.made] == [True, False, False]
    assert world.made[1] is kept


async def test_nobody_goes_while_the_name_server_is_away() -> None:
    names = Names(users=["10.0.0.1"])
    world = World(names, "dns+http://users:8000")
    await world.follower.look()
    del names.answers["users"]
    await world.follower.look()
    assert world.urls == {"http://10.0.0.1:8000"}
    names.answers["users"] = []
    await world.follower.look()
    assert world.urls == {"http://10.0.0.1:8000"}


async def test_this_system_resolves_names() -> None:
    from shared.resilience.discovery import addresses

    assert "127.0.0.1" in await addresses("localhost")
