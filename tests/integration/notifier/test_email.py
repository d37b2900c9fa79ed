"""Email through a real SMTP server: once each, whatever the server, the senders and the clock do."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from services.notifier.email_repository import claim_emails
from services.notifier.models import Email
from shared.database import Database
from shared.ids import new_id
from shared.testing import eventually
from tests.integration.notifier.conftest import Make, Node, Person, Sink
from tests.integration.notifier.smtp_script import SmtpScript


@pytest.fixture
async def script() -> AsyncIterator[SmtpScript]:
    async with SmtpScript().serving() as serving:
        yield serving


async def row(db: Database, person: Person) -> dict[str, Any]:
    async with db.transaction() as tx:
        found = await tx.fetchrow(
            "SELECT id, state, attempts, last_error, message_id, sent_at FROM emails WHERE user_id = $1", person.id
        )
    assert found is not None
    return dict(found)


async def row_in(db: Database, person: Person, state: str) -> dict[str, Any]:
    async def reached() -> dict[str, Any]:
        found = await row(db, person)
        assert found["state"] == state, found
        return found

    return await eventually(reached)


async def test_a_welcome(node: Node, sink: Sink, db: Database) -> None:
    person = Person(name="Jürgen <b>", locale="de")
    await node.give(person.registered())
    message = await sink.one_to(person.address)
    sent = await row_in(db, person, "sent")
    assert (sent["attempts"], sent["last_error"]) == (1, None)
    assert sent["sent_at"] is not None
    assert message["subject"] == "Willkommen bei Tenfold, Jürgen <b>"
    assert message["from"] == "no-reply@tenfold.test"
    assert message["headers"]["To"] == f'"Jürgen <b>" <{person.address}>'
    assert message["headers"]["Message-ID"] == sent["message_id"] == f"<{sent['id']}@tenfold.test>"
    assert message["headers"]["Auto-Submitted"] == "auto-generated"
    assert message["text"].startswith("Hallo Jürgen <b>,")
    assert "Jürgen &lt;b&gt;" in message["html"]


async def test_media(node: Node, sink: Sink, person: Person) -> None:
    await node.give(person.registered(), person.processed("Sea"), person.failed("Tree", "too many pixels"))

    async def all_there() -> dict[str, str]:
        found = {message["subject"]: message["text"] for message in await sink.to(person.address)}
        assert set(found) == {"Welcome to Tenfold, Ada", "“Sea” is ready", "“Tree” could not be processed"}
        return found

    assert "too many pixels" in (await eventually(all_there))["“Tree” could not be processed"]


async def test_refused_for_now_then_taken(node: Node, sink: Sink, db: Database, person: Person) -> None:
    await sink.fail(reply="451 try later", times=2, to=person.address)
    await node.give(person.registered())
    sent = await row_in(db, person, "sent")
    assert sent["attempts"] == 3
    messages = await sink.to(person.address)
    assert [message["headers"]["Message-ID"] for message in messages] == [sent["message_id"]]


async def test_refused_for_good(node: Node, sink: Sink, db: Database, person: Person) -> None:
    await sink.fail(reply="554 not wanted", to=person.address)
    await node.give(person.registered())
    failed = await row_in(db, person, "failed")
    assert (failed["attempts"], failed["last_error"]) == (1, "554 not wanted")


async def test_given_up_after_many_attempts(make: Make, sink: Sink, db: Database, person: Person) -> None:
    node = await make(email_max_attempts=3)
    await sink.fail(reply="451 try later", to=person.address)
    await node.give(person.registered())
    failed = await row_in(db, person, "failed")
    assert (failed["attempts"], failed["last_error"]) == (3, "451 try later")


async def test_an_answer_that_is_lost_is_ambiguous(node: Node, sink: Sink, db: Database, person: Person) -> None:
    await sink.fail(drop_after_data=1)
    await node.give(person.registered())
    ambiguous = await row_in(db, person, "ambiguous")
    assert ambiguous["attempts"] == 1
    assert len(await sink.to(person.address)) == 1  # it had arrived; sent again it would be there twice


async def test_ambiguous_is_sent_again_where_that_is_wanted(
    make: Make, sink: Sink, db: Database, person: Person
) -> None:
    node = await make(email_retry_ambiguous=True)
    await sink.fail(drop_after_data=1)
    await node.give(person.registered())
    sent = await row_in(db, person, "sent")
    assert sent["attempts"] == 2
    messages = await sink.to(person.address)
    # Twice, under one Message-ID, by which mail programs fold them into one.
    assert [message["headers"]["Message-ID"] for message in messages] == [sent["message_id"]] * 2


async def test_two_senders_send_each_email_once(make: Make, sink: Sink) -> None:
    nodes = [await make(), await make()]
    people = [Person() for _ in range(30)]
    await asyncio.gather(*(nodes[n % 2].give(person.registered()) for n, person in enumerate(people)))
    for person in people:
        await sink.one_to(person.address)
    for node in nodes:
        await node.stop()
    assert [len(await sink.to(person.address)) for person in people] == [1] * 30


async def test_no_server(make: Make, db: Database, script: SmtpScript, person: Person) -> None:
    node = await make(smtp_url="smtp://127.0.0.1:1", email_first_retry_seconds=60)
    await node.give(person.registered())

    async def tried() -> dict[str, Any]:
        found = await row(db, person)
        assert found["last_error"] is not None
        return found

    found = await eventually(tried)
    assert (found["state"], found["attempts"]) == ("queued", 1)
    assert found["last_error"].startswith("SMTPConnectError")


@pytest.mark.parametrize("step", ["greeting", "MAIL", "RCPT"])
async def test_a_server_that_hangs_before_data_costs_nothing(
    make: Make, db: Database, script: SmtpScript, person: Person, step: str
) -> None:
    released = asyncio.Event()
    script.before[step] = released.wait  # type: ignore[assignment]
    node = await make(smtp_url=script.url, smtp_command_seconds=0.2)
    await node.give(person.registered())

    async def tried() -> bool:
        return bool((await row(db, person))["attempts"] > 1)

    await eventually(tried)
    released.set()
    await row_in(db, person, "sent")
    assert len(script.bodies) == 1


@pytest.mark.parametrize("step", ["DATA", "body"])
async def test_a_server_that_hangs_from_data_on_is_ambiguous(
    make: Make, db: Database, script: SmtpScript, person: Person, step: str
) -> None:
    released = asyncio.Event()
    script.before[step] = released.wait  # type: ignore[assignment]
    node = await make(smtp_url=script.url, smtp_data_seconds=0.2)
    await node.give(person.registered())
    await row_in(db, person, "ambiguous")
    released.set()


async def test_a_refused_sender_is_ours_to_put_right(
    make: Make, db: Database, script: SmtpScript, person: Person
) -> None:
    script.replies["MAIL"] = "530 log in first"
    node = await make(smtp_url=script.url)
    await node.give(person.registered())

    async def tried() -> bool:
        return bool((await row(db, person))["attempts"] > 1)

    await eventually(tried)
    del script.replies["MAIL"]
    await row_in(db, person, "sent")


async def test_an_unknown_address_is_refused(make: Make, db: Database, script: SmtpScript, person: Person) -> None:
    script.replies["RCPT"] = "550 no such user"
    node = await make(smtp_url=script.url)
    await node.give(person.registered())
    assert (await row_in(db, person, "failed"))["last_error"] == "550 no such user"
    assert "DATA" not in script.commands


async def test_who_lost_its_lease_does_not_send(make: Make, db: Database, script: SmtpScript, person: Person) -> None:
    async def take_over() -> None:
        async with db.transaction() as tx:
            await tx.execute("UPDATE emails SET claim = $2 WHERE user_id = $1", person.id, new_id())

    script.before["RCPT"] = take_over
    node = await make(smtp_url=script.url)
    await node.give(person.registered())

    async def left() -> bool:
        return "QUIT" in script.commands

    await eventually(left)
    assert "DATA" not in script.commands
    assert (await row(db, person))["state"] == "claimed"


async def test_a_stop_lets_what_is_being_sent_finish(
    make: Make, db: Database, script: SmtpScript, person: Person
) -> None:
    reached, released = asyncio.Event(), asyncio.Event()

    async def hold() -> None:
        reached.set()
        await released.wait()

    script.before["body"] = hold
    node = await make(smtp_url=script.url)
    await node.give(person.registered())
    await reached.wait()
    stopping = asyncio.ensure_future(node.stop())
    await asyncio.sleep(0)
    released.set()
    await stopping
    assert (await row(db, person))["state"] == "sent"


async def _abandon(db: Database, person: Person, state: str) -> Email:
    """As a sender that was killed would leave it."""
    async with db.transaction() as tx:
        (email,) = await claim_emails(tx, new_id(), 1)
        await tx.execute(
            "UPDATE emails SET state = $2, claimed_at = now() - interval '1 hour' WHERE user_id = $1", person.id, state
        )
    return email


@pytest.mark.parametrize(
    ("left", "retry_ambiguous", "end", "arrived"),
    [("claimed", False, "sent", 1), ("sending", False, "ambiguous", 0), ("sending", True, "sent", 1)],
)
async def test_what_a_killed_sender_leaves(
    make: Make, db: Database, sink: Sink, person: Person, *, left: str, retry_ambiguous: bool, end: str, arrived: int
) -> None:
    idle = await make(smtp_url="smtp://127.0.0.1:1", email_first_retry_seconds=0, email_max_attempts=10**6)
    await idle.give(person.registered())
    await idle.stop()
    await _abandon(db, person, left)
    await make(email_retry_ambiguous=retry_ambiguous)
    found = await row_in(db, person, end)
    assert len(await sink.to(person.address)) == arrived
    if end == "ambiguous":
        assert found["last_error"] == "the sender went away while sending"


async def test_an_address_nobody_can_write_to(node: Node, db: Database) -> None:
    class Odd(Person):
        @property
        def address(self) -> str:
            return "a>b@example.com"

    person = Odd()
    await node.give(person.registered())
    assert (await row_in(db, person, "failed"))["last_error"] == "the address cannot be written to"


async def test_international_addresses(make: Make, node: Node, db: Database, sink: Sink, script: SmtpScript) -> None:
    class Jörg(Person):
        @property
        def address(self) -> str:
            return f"jörg{self.id.hex}@grün.example"

    person = Jörg()
    await node.give(person.registered())
    await row_in(db, person, "sent")
    (message,) = await sink.to(person.address.replace("grün", "xn--grn-ioa"))
    assert message["text"].startswith("Hello Ada,")
    await node.stop()
    await make(smtp_url=script.url)  # knows no SMTPUTF8
    node = await make(smtp_url=script.url)
    other = Jörg()
    await node.give(other.registered())
    assert "letters" in (await row_in(db, other, "failed"))["last_error"]


async def test_an_event_makes_one_email_also_without_its_inbox_row(
    node: Node, db: Database, sink: Sink, person: Person
) -> None:
    envelopes = await node.give(person.registered())
    await row_in(db, person, "sent")
    async with db.transaction() as tx:
        await tx.execute("DELETE FROM inbox")
    await node.give_again(envelopes)
    async with db.transaction() as tx:
        assert await tx.fetchval("SELECT count(*) FROM emails WHERE user_id = $1", person.id) == 1


async def test_a_title_with_a_link_is_in_the_inbox_only(node: Node, person: Person, sink: Sink) -> None:
    await node.give(person.processed("https://example.com/win"), person.registered())

    async def both() -> list[dict[str, Any]]:
        found = await sink.to(person.address)
        return found if len(found) == 2 else []

    found = await eventually(both)
    assert "Your photo is ready" in {mail["subject"] for mail in found}
    assert not any("example.com/win" in mail["text"] + mail["html"] for mail in found)
    _, inbox = await node.call("GET", "", person.id)
    assert "“https://example.com/win” is ready" in {item["title"] for item in inbox["items"]}
