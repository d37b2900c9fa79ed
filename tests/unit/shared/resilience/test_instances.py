from collections.abc import Collection
from dataclasses import dataclass

from shared.resilience import Instances
from shared.testing import Ticks


@dataclass(eq=False)
class Member:
    in_flight: int = 0
    url: str = ""


def chosen(instances: Instances[Member], tried: Collection[Member] = (), times: int = 300) -> set[Member | None]:
    return {instances.choose(tried) for _ in range(times)}


def test_the_busier_of_two_is_not_asked() -> None:
    busy, free = Member(9), Member(1)
    assert chosen(Instances([busy, free])) == {free}


def test_the_busiest_of_three_is_never_asked() -> None:
    members = [Member(9), Member(1), Member(1)]
    assert chosen(Instances(members)) == set(members[1:])


def test_whoever_was_tried_is_not_asked_again() -> None:
    members = [Member(), Member(), Member()]
    instances = Instances(members)
    assert chosen(instances, [members[0]]) == set(members[1:])
    assert chosen(instances, members) == {None}
    assert chosen(Instances()) == {None}


def test_who_fails_three_times_in_a_row_is_left_out_until_it_answers() -> None:
    members = [Member(), Member(), Member()]
    instances = Instances(members)
    assert [instances.failed(members[0]) for _ in range(3)] == [False, False, True]
    assert chosen(instances) == set(members[1:])
    assert chosen(instances, members[1:]) == {members[0]}  # nobody else is left
    instances.answered(members[0])
    assert chosen(instances) == set(members)


def test_an_answer_between_failures_counts() -> None:
    members = [Member(), Member()]
    instances = Instances(members)
    for _ in range(10):
        instances.failed(members[0])
        instances.failed(members[0])
        instances.answered(members[0])
    assert chosen(instances) == set(members)


def test_it_is_left_out_longer_each_time_it_fails_again() -> None:
    ticks = Ticks()
    members = [Member(), Member()]
    instances = Instances(members, ticks)
    for _ in range(3):
        instances.failed(members[0])
    ticks.move(2.1)
    assert chosen(instances) == set(members)
    instances.failed(members[0])
    ticks.move(2.1)
    assert chosen(instances) == {members[1]}
    ticks.move(2)
    assert chosen(instances) == set(members)


def test_never_more_than_half_are_ejected() -> None:
    members = [Member() for _ in range(5)]
    instances = Instances(members)
    for member in members:
        for _ in range(5):
            instances.failed(member)
    assert chosen(instances) == set(members[2:])


def test_an_ejected_one_is_not_chosen_for_being_free() -> None:
    members = [Member(0), Member(5)]
    instances = Instances(members)
    for _ in range(3):
        instances.failed(members[0])
    assert chosen(instances) == {members[1]}


def test_who_leaves_is_asked_only_when_nobody_else_is_there() -> None:
    ticks = Ticks()
    members = [Member(), Member()]
    instances = Instances(members, ticks)
    instances.leaves(members[0])
    assert chosen(instances) == {members[1]}
    instances.leaves(members[1])
    assert chosen(instances) == set(members)
    ticks.move(1.1)
    assert chosen(instances) == set(members)


def test_they_come_and_go() -> None:
    one, other = Member(), Member()
    instances = Instances([one])
    instances.add(other)
    assert chosen(instances) == {one, other}
    instances.remove(one)
    instances.failed(one)
    assert chosen(instances) == {other}
    assert len(instances) == 1
