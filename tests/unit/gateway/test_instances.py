from dataclasses import dataclass

from services.gateway.instances import Instances


@dataclass(eq=False)
class Member:
    in_flight: int = 0

    def close(self) -> None: ...


def firsts(instances: Instances[Member], times: int = 200) -> set[int]:
    return {id(instances.in_order()[0]) for _ in range(times)}


def test_the_busier_of_two_is_not_asked() -> None:
    busy, free = Member(9), Member(1)
    assert firsts(Instances([busy, free])) == {id(free)}


def test_the_busiest_of_three_is_never_asked_first() -> None:
    members = [Member(9), Member(1), Member(1)]
    assert firsts(Instances(members)) == {id(members[1]), id(members[2])}


def test_who_fails_three_times_in_a_row_comes_last_until_it_answers() -> None:
    members = [Member(), Member(), Member()]
    instances = Instances(members)
    for _ in range(2):
        instances.failed(members[0])
    assert id(members[0]) in firsts(instances)
    instances.failed(members[0])
    assert all(instances.in_order()[-1] is members[0] for _ in range(100))
    instances.answered(members[0])
    assert id(members[0]) in firsts(instances)


def test_never_more_than_half_are_ejected() -> None:
    members = [Member() for _ in range(5)]
    instances = Instances(members)
    for member in members:
        for _ in range(5):
            instances.failed(member)
    assert firsts(instances, 500) == {id(member) for member in members[2:]}


def test_an_ejected_one_is_not_chosen_for_being_free() -> None:
    members = [Member(0), Member(5)]
    instances = Instances(members)
    for _ in range(3):
        instances.failed(members[0])
    assert firsts(instances) == {id(members[1])}
