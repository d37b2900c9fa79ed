"""Sends the queued email: claim, send, note how it ended (the states stand in `models`).

Any number of senders may run; no two ever send the same email, since only who has claimed it can note that it is about
to leave. Woken at commit in the same process; polling finds what others queued and what is due again.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from email.message import EmailMessage
from uuid import UUID

from services.notifier import campaign_repository, repository
from services.notifier.channels.email import Composer, NotSendable, Result, Smtp
from services.notifier.models import Campaign, Email, Outcome, RetryPolicy, greeting_name
from services.notifier.settings import Settings
from services.notifier.texts import Texts
from shared import metrics
from shared.consumer import delay
from shared.database import Database
from shared.errors import NotFound, TenfoldError
from shared.ids import new_id
from shared.limits import Limit, RateLimiter
from shared.logs import get_logger
from shared.sealing import link_cipher

log = get_logger()

_ERROR_LENGTH = 500
_NOTE_ATTEMPTS = 6
_TURNS = 20
_POSTPONE_SECONDS = 2.0

EMAILS = metrics.Counter("tenfold_notifier_emails_total", "Attempts to send email by outcome", ("category", "outcome"))
ABANDONED = metrics.Counter("tenfold_notifier_emails_abandoned_total", "Emails whose sender went away with them")


class NotOurs(Exception):
    """The lease ran out and somebody else has the email."""


class Sender:
    def __init__(
        self, db: Database, smtp: Smtp, composer: Composer, texts: Texts, limiter: RateLimiter, settings: Settings
    ) -> None:
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
        self._limiter = limiter
        self._domain_limit = Limit(settings.email_domain_per_second, 1)
        self._last_campaign: Campaign | None = None
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
            if not await self._may_send(email):
                return
            result = await self._attempt(email)
        except TenfoldError as error:  # its lease runs out, and it is tried again
            log.warning("email_not_attempted", email_id=str(email.id), error=str(error))
            return
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

        if email.suppressed:
            return Result(Outcome.SUPPRESSED, "not wanted, or the address refuses email")
        try:
            message = await self._compose(email)
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

    async def _compose(self, email: Email) -> EmailMessage:
        name = greeting_name(email.display_name)
        if email.campaign_id is None:
            context = email.context | {"display_name": name, "token": self._token(email)}
            content = self._texts.email(email.category, email.locale, context)
            return self._composer.compose(content, name, email.address, email.message_id)
        campaign = await self._campaign(email.campaign_id)
        url = self._texts.unsubscribe_url(email.unsubscribe_token)
        content = self._texts.campaign(campaign.subject, campaign.text, campaign.html, email.locale, url)
        return self._composer.compose(content, name, email.address, email.message_id, url)

    async def _campaign(self, campaign_id: UUID) -> Campaign:
        """The texts of a campaign do not change, so the last one is kept."""
        if self._last_campaign is None or self._last_campaign.id != campaign_id:
            async with self._db.transaction() as tx:
                self._last_campaign = await campaign_repository.get_campaign(tx, campaign_id)
        if self._last_campaign is None:
            raise NotFound
        return self._last_campaign

    async def _may_send(self, email: Email) -> bool:
        """Wait for the turn that the limit of the recipient's provider gives to a campaign's email; false when that
        takes long, and the email is back in the queue."""
        if email.campaign_id is None or email.suppressed:
            return True
        domain = email.address.rpartition("@")[2]
        for _ in range(_TURNS):
            decision = await self._limiter.hit(f"email:{domain}", self._domain_limit)
            if decision.allowed:
                return True
            await asyncio.sleep(decision.retry_after)
        async with self._db.transaction() as tx:
            await repository.postpone_email(tx, email.id, email.claim, _POSTPONE_SECONDS)
        return False

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
                    if result.bounced:
                        await campaign_repository.suppress_address(tx, email.address, result.reason[:_ERROR_LENGTH])
            except TenfoldError as error:
                log.warning("email_not_noted", email_id=str(email.id), error=str(error))
                await asyncio.sleep(delay(attempt))
            else:
                return
        log.error("email_left_in_hand", email_id=str(email.id), outcome=result.outcome.value)
