"""Sends the queued email: claim, send, note how it ended (the states stand in `models`).

Any number of senders may run; no two ever send the same email, since only who has claimed it can note that it is about
to leave. Woken at commit in the same process; polling finds what others queued and what is due again. Claims are taken
some at a time, and what is noted for emails at the same moment shares a transaction.
"""

import asyncio
from collections import OrderedDict
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from uuid import UUID

import asyncpg

from services.notifier import campaign_repository
from services.notifier import email_repository as repository
from services.notifier.channels.email import Composer, Letter, NotSendable
from services.notifier.channels.smtp import Result, Smtp
from services.notifier.models import (
    Campaign,
    Content,
    Email,
    EmailState,
    Ended,
    Leaving,
    Outcome,
    RetryPolicy,
    in_email,
    without_links,
)
from services.notifier.settings import Settings
from services.notifier.texts import Texts
from shared import metrics
from shared.consumer import delay
from shared.database import Database
from shared.errors import NotFound, TenfoldError
from shared.group_commit import GroupCommit
from shared.ids import new_id
from shared.limits import Limit, RateLimiter
from shared.logs import get_logger
from shared.sealing import link_cipher

log = get_logger()

_ERROR_LENGTH = 500
_NOTE_ATTEMPTS = 6
_TURN_SECONDS = 2.0
_TAKES_A_SECOND = 20
_PROVIDERS = 10_000
_ANYBODY = UUID(int=0)
_RELEASE_SECONDS = 1.0
_RELEASE_BATCH = 1000

EMAILS = metrics.Counter("tenfold_notifier_emails_total", "Attempts to send email by outcome", ("category", "outcome"))
ABANDONED = metrics.Counter("tenfold_notifier_emails_abandoned_total", "Emails whose sender went away with them")


class NotNow(Exception):
    """The email is not to be sent after all: its state says why, or somebody else has it."""

    def __init__(self, state: EmailState | None) -> None:
        super().__init__(state or "taken over")
        self.state = state


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
        self._turns = Turns(limiter, settings.email_domain_per_second)
        self._notes = GroupCommit(db, repository.note, key=lambda note: note.email.id, at_once=1)
        self._last_campaign: Campaign | None = None
        self._last_contents: dict[tuple[UUID, str], Content] = {}
        self._links = link_cipher(settings.link_secret)
        self._woken = asyncio.Event()
        self._stopping = False
        self._in_hand: set[asyncio.Task[None]] = set()
        self._release_at = 0.0

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
        # Many claims cost hardly more than one, so free hands wait for each other; but not for long, some may be slow.
        loop, wait_until = asyncio.get_running_loop(), 0.0
        while not self._stopping:
            self._woken.clear()
            free = self._settings.email_concurrency - len(self._in_hand)
            enough = 2 * free >= self._settings.email_concurrency
            if (enough or loop.time() >= wait_until) and await self._take_up(free):
                wait_until = loop.time() + self._settings.email_poll_seconds
                continue
            with suppress(TimeoutError):
                async with asyncio.timeout(self._settings.email_poll_seconds):
                    await self._woken.wait()
        if self._in_hand:
            await asyncio.wait(self._in_hand)

    async def _take_up(self, free: int) -> bool:
        """Start on what is due, as far as hands are free; false when there was nothing or no free hand."""
        if free <= 0:
            return False
        claimed: list[Email] = []
        with _logged():
            await self._release()
            async with self._db.transaction() as tx:
                claimed += await repository.claim_emails(tx, new_id(), free)
        if len(claimed) < free:
            with _logged():
                claimed += await self._claim_of_campaigns(free - len(claimed))
        for email in claimed:
            if email.suppressed:
                metrics.child(EMAILS, email.category, EmailState.SUPPRESSED).inc()
                continue
            task = asyncio.create_task(self._deliver(email))
            self._in_hand.add(task)
            task.add_done_callback(self._put_down)
        return bool(claimed)

    async def _claim_of_campaigns(self, most: int) -> Sequence[Email]:
        """Apart from other email, which no campaign may hold up."""
        try:
            async with self._db.transaction() as tx:
                return await repository.claim_campaign_emails(tx, new_id(), most)
        except asyncpg.InvalidParameterValueError:
            # The server that knew the time zone has been upgraded, or another has taken its place.
            async with self._db.transaction() as tx:
                paused = await campaign_repository.pause_without_time_zone(tx)
            if not paused:
                raise
            log.error("campaigns_paused", campaigns=[str(campaign) for campaign in paused], reason="unknown time zone")
            return ()

    async def _release(self) -> None:
        """Give back what senders that went away have in hand, once in a while."""
        loop = asyncio.get_running_loop()
        if loop.time() < self._release_at:
            return
        self._release_at = loop.time() + _RELEASE_SECONDS
        async with self._db.transaction() as tx:
            abandoned = await repository.release_abandoned_emails(
                tx, self._settings.email_lease_seconds, self._policy.retry_ambiguous, _RELEASE_BATCH
            )
        if abandoned:
            ABANDONED.inc(abandoned)
            log.warning("emails_abandoned", emails=abandoned)

    def _put_down(self, task: asyncio.Task[None]) -> None:
        self._in_hand.discard(task)
        self._woken.set()

    async def _deliver(self, email: Email) -> None:
        try:
            if email.campaign_id is not None and not await self._turns.take(email.address):
                await self._note(Ended(email, EmailState.QUEUED, _TURN_SECONDS, "waits for its turn", counted=False))
                return
            result = await self._attempt(email)
        except TenfoldError as error:  # its lease runs out, and it is tried again
            log.warning("email_not_attempted", email_id=str(email.id), error=str(error))
            return
        except NotNow as verdict:
            log.info("email_not_sent", email_id=str(email.id), verdict=str(verdict))
            if verdict.state is EmailState.SUPPRESSED:
                metrics.child(EMAILS, email.category, verdict.state).inc()
            return
        metrics.child(EMAILS, email.category, result.outcome).inc()
        log.info("email_attempted", email_id=str(email.id), category=email.category, outcome=result.outcome)
        state, seconds = self._policy.decide(result.outcome, email.attempts)
        await self._note(
            Ended(email, state, seconds, result.reason[:_ERROR_LENGTH] or None, bounced=result.bounced),
        )

    async def _attempt(self, email: Email) -> Result:
        async def before_data() -> None:
            state = await self._notes.write(Leaving(email))
            if state is not EmailState.SENDING:
                raise NotNow(state)

        try:
            return await self._smtp.send(await self._compose(email), before_data)
        except NotSendable as error:
            return Result(Outcome.REFUSED, str(error))
        except TenfoldError as error:
            return Result(Outcome.POSTPONED, f"{type(error).__name__}: {error}")
        except NotNow:
            raise
        except Exception as error:
            # Raised before or beside the sending (a broken template, say): the next release may do better.
            log.exception("email_not_attempted", email_id=str(email.id))
            return Result(Outcome.POSTPONED, type(error).__name__)

    async def _compose(self, email: Email) -> Letter:
        name = without_links(email.display_name)
        if email.campaign_id is None:
            context = in_email(email.context) | {"display_name": name, "token": self._token(email)}
            content = self._texts.email(email.category, email.locale, context)
            return self._composer.compose(content, name, email.address, email.message_id)
        campaign = await self._campaign(email.campaign_id)
        url = self._texts.unsubscribe_url(email.unsubscribe_token)
        content = self._content(campaign, email.locale, url)
        return self._composer.compose(content, name, email.address, email.message_id, url)

    def _content(self, campaign: Campaign, locale: str, url: str) -> Content:
        """Rendered once for all who read the same language; only the link is each recipient's own."""
        anybodys = self._texts.unsubscribe_url(_ANYBODY)
        key = (campaign.id, locale.partition("-")[0])
        if (content := self._last_contents.get(key)) is None:
            content = self._texts.campaign(campaign.subject, campaign.text, campaign.html, locale, anybodys)
            self._last_contents[key] = content
        return Content(content.subject, content.text.replace(anybodys, url), content.html.replace(anybodys, url))

    async def _campaign(self, campaign_id: UUID) -> Campaign:
        """The texts of a campaign do not change, so the last one is kept."""
        campaign = self._last_campaign
        if campaign is None or campaign.id != campaign_id:
            async with self._db.transaction() as tx:
                campaign = await campaign_repository.get_campaign(tx, campaign_id)
            if campaign is None:
                raise NotFound
            self._last_campaign, self._last_contents = campaign, {}
        return campaign

    def _token(self, email: Email) -> str:
        """Of the email's link, opened for this message only; empty where it has none."""
        sealed: str = email.context.get("sealed_token", "")
        return self._links.decrypt(sealed).decode() if sealed else ""

    async def _note(self, ended: Ended) -> None:
        for attempt in range(1, _NOTE_ATTEMPTS + 1):
            try:
                await self._notes.write(ended)
            except TenfoldError as error:
                log.warning("email_not_noted", email_id=str(ended.email.id), error=str(error))
                await asyncio.sleep(delay(attempt))
            else:
                return
        log.error("email_left_in_hand", email_id=str(ended.email.id), state=ended.state)


@contextmanager
def _logged() -> Iterator[None]:
    """What cannot be claimed now, the next poll finds."""
    try:
        yield
    except TenfoldError as error:
        log.warning("emails_not_claimed", error=str(error))
    except Exception:
        log.exception("emails_not_claimed")


class _Provider:
    """Turns that were taken and not used yet, and until when they are good."""

    __slots__ = ("lock", "turns", "until")

    def __init__(self) -> None:
        self.lock = asyncio.Lock()  # of those who wait one asks, and the others wait for that one
        self.turns = 0
        self.until = 0.0


class Turns:
    """Turns at the providers of recipients, to each so many a second, however many senders there are. Where there are
    many, some are taken at a time."""

    def __init__(self, limiter: RateLimiter, per_second: int) -> None:
        self._limiter = limiter
        self._at_a_time = max(1, per_second // _TAKES_A_SECOND)
        self._limit = Limit(per_second // self._at_a_time, 1)
        self._providers: OrderedDict[str, _Provider] = OrderedDict()

    async def take(self, address: str) -> bool:
        """Wait for a turn at the address's provider; false when that takes long."""
        domain = address.rpartition("@")[2].lower()
        provider = self._provider(domain)
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(_TURN_SECONDS), provider.lock:
                while not provider.turns or loop.time() > provider.until:
                    decision = await self._limiter.hit(f"email:{domain}", self._limit)
                    if decision.allowed:
                        provider.turns, provider.until = self._at_a_time, loop.time() + 1
                    else:
                        await asyncio.sleep(decision.retry_after)
                provider.turns -= 1
        except TimeoutError:
            return False
        return True

    def _provider(self, domain: str) -> _Provider:
        provider = self._providers.setdefault(domain, _Provider())
        self._providers.move_to_end(domain)
        if len(self._providers) > _PROVIDERS:
            self._providers.popitem(last=False)
        return provider
