"""Sends the queued email: claim, send, note how it ended (the states stand in `models`).

Any number of senders may run; no two ever send the same email, since only who has claimed it can note that it is about
to leave. Woken at commit in the same process; polling finds what others queued and what is due again.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from services.notifier import repository
from services.notifier.channels.email import Composer, NotSendable, Result, Smtp
from services.notifier.models import Email, Outcome, RetryPolicy, greeting_name
from services.notifier.settings import Settings
from services.notifier.texts import Texts
from shared import metrics
from shared.consumer import delay
from shared.database import Database
from shared.errors import TenfoldError
from shared.ids import new_id
from shared.logs import get_logger
from shared.sealing import link_cipher

log = get_logger()

_ERROR_LENGTH = 500
_NOTE_ATTEMPTS = 6

EMAILS = metrics.Counter("tenfold_notifier_emails_total", "Attempts to send email by outcome", ("category", "outcome"))
ABANDONED = metrics.Counter("tenfold_notifier_emails_abandoned_total", "Emails whose sender went away with them")


class NotOurs(Exception):
    """The lease ran out and somebody else has the email."""


class Sender:
    def __init__(self, db: Database, smtp: Smtp, composer: Composer, texts: Texts, settings: Settings) -> None:
        self._db = db
        self._smtp = smtp
        self._composer = composer
        self._texts = texts
        self._settings = settings
        self._policy = RetryPolicy(
            max_attempts=settings.email_max_attempts,
            first_delay=settings.email_first_retry_seconds,
            longest_delay=settings.email_longest_retry_seconds,
            retry_ambiguous=settings.email_retry_ambiguous,
        )
        self._links = link_cipher(settings.link_secret)
        self._woken = asyncio.Event()
        self._stopping = False
        self._in_hand: set[asyncio.Task[None]] = set()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Send while open; then finish what is in hand, for cutting it off would leave it ambiguous."""
        task = asyncio.create_task(self._run(), name="email-sender")
        try:
            yield
        finally:
            self._stopping = True
            self.wake()
            await asyncio.wait([task], timeout=self._settings.shutdown_seconds)
            for left in (task, *self._in_hand):
                left.cancel()
            await asyncio.gather(task, *self._in_hand, return_exceptions=True)

    def wake(self) -> None:
        self._woken.set()

    async def _run(self) -> None:
        while not self._stopping:
            self._woken.clear()
            if not await self._take_up():
                with suppress(TimeoutError):
                    async with asyncio.timeout(self._settings.email_poll_seconds):
                        await self._woken.wait()
        if self._in_hand:
            await asyncio.wait(self._in_hand)

    async def _take_up(self) -> bool:
        """Start on what is due, as far as hands are free; false when there was nothing or no free hand."""
        free = self._settings.email_concurrency - len(self._in_hand)
        if free <= 0:
            return False
        try:
            async with self._db.transaction() as tx:
                abandoned = await repository.release_abandoned_emails(
                    tx, self._settings.email_lease_seconds, self._policy.retry_ambiguous
                )
                claimed = await repository.claim_emails(tx, new_id(), free)
        except TenfoldError as error:
            log.warning("emails_not_claimed", error=str(error))
            return False
        ABANDONED.inc(abandoned)
        for email in claimed:
            task = asyncio.create_task(self._deliver(email))
            self._in_hand.add(task)
            task.add_done_callback(self._put_down)
        return bool(claimed)

    def _put_down(self, task: asyncio.Task[None]) -> None:
        self._in_hand.discard(task)
        self._woken.set()

    async def _deliver(self, email: Email) -> None:
        try:
            result = await self._attempt(email)
        except NotOurs:
            log.warning("email_taken_over", email_id=str(email.id))
            return
        EMAILS.labels(email.category, result.outcome.value).inc()
        log.info("email_attempted", email_id=str(email.id), category=email.category, outcome=result.outcome.value)
        await self._note(email, result)

    async def _attempt(self, email: Email) -> Result:
        async def before_data() -> None:
            async with self._db.transaction() as tx:
                if not await repository.begin_sending(tx, email.id, email.claim):
                    raise NotOurs

        try:
            name = greeting_name(email.display_name)
            context = email.context | {"display_name": name, "token": self._token(email)}
            content = self._texts.email(email.category, email.locale, context)
            message = self._composer.compose(content, name, email.address, email.message_id)
            return await self._smtp.send(message, before_data)
        except NotSendable as error:
            return Result(Outcome.REFUSED, str(error))
        except TenfoldError as error:
            return Result(Outcome.POSTPONED, f"{type(error).__name__}: {error}")
        except NotOurs:
            raise
        except Exception as error:
            # Raised before or beside the sending (a broken template, say): the next release may do better.
            log.exception("email_not_attempted", email_id=str(email.id))
            return Result(Outcome.POSTPONED, type(error).__name__)

    def _token(self, email: Email) -> str:
        """Of the email's link, opened for this message only; empty where it has none."""
        sealed: str = email.context.get("sealed_token", "")
        return self._links.decrypt(sealed).decode() if sealed else ""

    async def _note(self, email: Email, result: Result) -> None:
        state, seconds = self._policy.decide(result.outcome, email.attempts)
        for attempt in range(1, _NOTE_ATTEMPTS + 1):
            try:
                async with self._db.transaction() as tx:
                    await repository.finish_attempt(
                        tx, email.id, email.claim, state, seconds, result.reason[:_ERROR_LENGTH] or None
                    )
            except TenfoldError as error:
                log.warning("email_not_noted", email_id=str(email.id), error=str(error))
                await asyncio.sleep(delay(attempt))
            else:
                return
        log.error("email_left_in_hand", email_id=str(email.id), outcome=result.outcome.value)
