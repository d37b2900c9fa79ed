"""Turns by owner."""

import asyncio
from uuid import UUID

from services.media.fairness import FairGate

ANN, BOB, CID = UUID(int=1), UUID(int=2), UUID(int=3)


async def _served(gate: FairGate, arrivals: list[UUID]) -> list[UUID]:
    """In which order those who come in this order, all at once, are let in."""
    served: list[UUID] = []

    async def come(owner_id: UUID) -> None:
        async with gate.turn(owner_id):
            served.append(owner_id)
            await asyncio.sleep(0)

    async with asyncio.TaskGroup() as group:
        for owner_id in arrivals:
            group.create_task(come(owner_id))
    return served


async def test_owners_take_turns() -> None:
    assert await _served(FairGate(1), [ANN] * 5 + [BOB] * 2 + [CID]) == [ANN, ANN, BOB, CID, ANN, BOB, ANN, ANN]


async def test_a_thousand_images_delay_nobody_elses() -> None:
    served = await _served(FairGate(3), [ANN] * 1000 + [BOB])
    position = served.index(BOB)
    print(f"the other's one image is number {position + 1} of {len(served)}; first come, first served: {len(served)}")
    assert position <= 4
    assert len(served) == 1001


async def test_never_more_than_its_places() -> None:
    gate, inside, most = FairGate(3), 0, 0

    async def come(owner_id: UUID) -> None:
        nonlocal inside, most
        async with gate.turn(owner_id):
            inside += 1
            most = max(most, inside)
            await asyncio.sleep(0)
            inside -= 1

    await asyncio.gather(*(come(owner_id) for owner_id in [ANN, BOB, CID] * 10))
    assert (most, inside) == (3, 0)


async def test_cancelled_ones_take_no_place() -> None:
    gate = FairGate(1)
    async with gate.turn(ANN):
        waiting = [asyncio.create_task(_served(gate, [BOB])) for _ in range(3)]
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        waiting[0].cancel()
        await asyncio.wait(waiting[:1])
    waiting[1].cancel()  # called already, or still waiting
    await asyncio.wait(waiting)
    async with asyncio.timeout(5):
        assert await _served(gate, [CID]) == [CID]
