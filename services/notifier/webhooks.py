"""Webhooks: what their owners do with them, and the dispatcher that delivers.

Retried with growing delays for about a day; an endpoint that has taken nothing for so long, or says 410, is disabled
and its owner told. Delivered at least once: `webhook-id` is the same in every attempt.
"""

import asyncio
import base64
import random
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any
from urllib.parse import urlsplit
from uuid import UUID

import msgspec

from services.notifier import webhook_repository as repository
from services.notifier.channels.webhook import Attempt, WebhookClient
from services.notifier.errors import NotAWebhookUrl, TooManyWebhooks, WebhookDisabled
from services.notifier.models import Delivery, DeliveryInHand, Webhook, WebhookEvent
from services.notifier.repository import ensure_recipient
from services.notifier.settings import Settings
from shared import forgetting, metrics
from shared.clock import Clock
from shared.database import Connection, Database, Transaction
from shared.errors import NotFound, TenfoldError, Unauthenticated
from shared.idempotency import Once
from shared.ids import new_id
from shared.logs import get_logger
from shared.paging import PageQuery

log = get_logger()

MAX_A_USER = 20
_SECRET_BYTES = 32
_ERROR_LENGTH = 200

ATTEMPTS = metrics.Counter("tenfold_notifier_webhook_attempts_total", "Attempts to deliver by outcome", ("outcome",))

# Tells the owner, in the transaction: an id for the telling, owner, URL.
TellDisabled = Callable[[Transaction, UUID, UUID, str], Awaitable[None]]


class Webhooks:
    """The use cases of owners."""

    def __init__(self, db: Database, settings: Settings) -> None:
        self._db = db
        self._secure_only = not settings.webhook_private_networks

    async def create(self, user_id: UUID, url: str, events: Sequence[WebhookEvent], once: Once) -> Webhook:
        """Raises `NotAWebhookUrl`, `TooManyWebhooks`."""
        check_url(url, secure_only=self._secure_only)
        secret = "whsec_" + base64.b64encode(secrets.token_bytes(_SECRET_BYTES)).decode()
        async with self._db.transaction() as tx:
            if await forgetting.is_forgotten(tx, user_id):
                raise Unauthenticated("the account is gone")
            # Only the id is kept: what is kept must hold no secret.
            if (earlier := await once.find(tx, UUID)) is not None:
                return await _get(tx, user_id, earlier)
            await ensure_recipient(tx, user_id)
            if await repository.count_webhooks(tx, user_id) >= MAX_A_USER:
                raise TooManyWebhooks(f"at most {MAX_A_USER}")
            webhook = await repository.insert_webhook(tx, new_id(), user_id, url, sorted(set(events)), secret)
            await once.keep(tx, webhook.id)
        return webhook

    async def list(self, user_id: UUID, query: PageQuery) -> Sequence[Webhook]:
        return await self._db.read(repository.list_webhooks, user_id, query.before(), query.limit + 1)

    async def delete(self, user_id: UUID, webhook_id: UUID) -> None:
        async with self._db.transaction() as tx:
            if not await repository.delete_webhook(tx, user_id, webhook_id):
                raise NotFound

    async def deliveries(self, user_id: UUID, webhook_id: UUID, query: PageQuery) -> Sequence[Delivery]:
        async def ask(connection: Connection) -> Sequence[Delivery]:
            await _get(connection, user_id, webhook_id)
            return await repository.list_deliveries(connection, webhook_id, query.before(), query.limit + 1)

        return await self._db.read(ask)

    async def redeliver(self, user_id: UUID, webhook_id: UUID, delivery_id: UUID) -> None:
        """Queue a delivery once more, whatever became of it. Raises `WebhookDisabled`."""
        async with self._db.transaction() as tx:
            if (await _get(tx, user_id, webhook_id)).disabled_at is not None:
                raise WebhookDisabled("make a new one")
            if not await repository.requeue_delivery(tx, webhook_id, delivery_id):
                raise NotFound


async def _get(connection: Connection, user_id: UUID, webhook_id: UUID) -> Webhook:
    webhook = await repository.get_webhook(connection, user_id, webhook_id)
    if webhook is None:
        raise NotFound
    return webhook


class WebhookQueue:
    """Where events for webhooks go in, and whom that wakes."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.woken = asyncio.Event()

    async def add(
        self, tx: Transaction, event_id: UUID, user_id: UUID, event: WebhookEvent, data: dict[str, Any]
    ) -> None:
        """Queue the event for those of the user's webhooks that want it, in the transaction of the event's effect."""
        webhooks = await repository.list_subscribed(tx, user_id, event)
        if not webhooks:
            return
        now = self._clock.now().isoformat()
        payload = msgspec.json.encode({"type": event.value, "timestamp": now, "data": data}).decode()
        for webhook_id in webhooks:
            await repository.insert_delivery(tx, new_id(), webhook_id, event_id, event, payload)
        tx.after_commit(self.woken.set)


class Dispatcher:
    """Delivers what is due. Any number may run; woken at commit in the same process, polling finds the rest."""

    def __init__(
        self,
        db: Database,
        client: WebhookClient,
        queue: WebhookQueue,
        settings: Settings,
        clock: Clock,
        tell_disabled: TellDisabled,
    ) -> None:
        self._db = db
        self._client = client
        self._settings = settings
        self._clock = clock
        self._tell_disabled = tell_disabled
        self._woken = queue.woken
        self._in_hand: set[asyncio.Task[None]] = set()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Deliver while open. What is in hand then is given up; its lease runs out and another attempt is made."""
        task = asyncio.create_task(self._run(), name="webhook-dispatcher")
        try:
            yield
        finally:
            for left in (task, *self._in_hand):
                left.cancel()
            await asyncio.gather(task, *self._in_hand, return_exceptions=True)

    async def _run(self) -> None:
        while True:
            self._woken.clear()
            if not await self._take_up():
                with suppress(TimeoutError):
                    async with asyncio.timeout(self._settings.webhook_poll_seconds):
                        await self._woken.wait()

    async def _take_up(self) -> bool:
        """Start on what is due, as far as hands are free; false when there was nothing or no free hand."""
        free = self._settings.webhook_concurrency - len(self._in_hand)
        if free <= 0:
            return False
        try:
            async with self._db.transaction() as tx:
                claimed = await repository.claim_deliveries(
                    tx, new_id(), free, 2 * self._settings.webhook_timeout_seconds
                )
        except TenfoldError as error:
            log.warning("webhooks_not_claimed", error=str(error))
            return False
        except Exception:
            log.exception("webhooks_not_claimed")
            return False
        for delivery in claimed:
            task = asyncio.create_task(self._deliver(delivery))
            self._in_hand.add(task)
            task.add_done_callback(self._put_down)
        return bool(claimed)

    def _put_down(self, task: asyncio.Task[None]) -> None:
        self._in_hand.discard(task)
        self._woken.set()

    async def _deliver(self, delivery: DeliveryInHand) -> None:
        """Whatever goes wrong beside the call: the lease runs out, and it is tried again."""
        try:
            await self._try(delivery)
        except TenfoldError as error:
            log.warning("webhook_not_noted", delivery_id=str(delivery.id), error=str(error))
        except Exception:
            log.exception("webhook_not_attempted", delivery_id=str(delivery.id))

    async def _try(self, delivery: DeliveryInHand) -> None:
        message_id = f"msg_{delivery.event_id.hex}"
        attempt = await self._client.post(
            delivery.url, delivery.secret, message_id, self._clock.now(), delivery.payload
        )
        ATTEMPTS.labels("delivered" if attempt.delivered else "failed").inc()
        log.info("webhook_attempted", delivery_id=str(delivery.id), status=attempt.status, attempt=delivery.attempts)
        async with self._db.transaction() as tx:
            await self._note(tx, delivery, attempt)

    async def _note(self, tx: Transaction, delivery: DeliveryInHand, attempt: Attempt) -> None:
        if attempt.delivered and attempt.status is not None:
            await repository.note_delivered(tx, delivery, attempt.status)
            return
        delays = self._settings.webhook_retry_seconds
        delay = None if attempt.gone or delivery.attempts > len(delays) else _spread(delays[delivery.attempts - 1])
        failing = await repository.note_failed(tx, delivery, attempt.status, attempt.error[:_ERROR_LENGTH], delay)
        if attempt.gone or (delay is None and failing >= sum(delays)):
            owner = await repository.disable_webhook(tx, delivery.webhook_id)
            if owner is not None:
                await self._tell_disabled(tx, delivery.id, owner, delivery.url)


def _spread(seconds: float) -> float:
    """So that what failed together does not come back together."""
    return seconds * random.uniform(1, 1.1)  # noqa: S311 - no secret


def check_url(url: str, *, secure_only: bool) -> None:
    """Raises `NotAWebhookUrl`. Where a name leads is found out when it is called."""
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError:
        raise NotAWebhookUrl("is not a URL") from None
    if parts.scheme not in (("https",) if secure_only else ("https", "http")) or not host:
        raise NotAWebhookUrl("must begin with https://" if secure_only else "must begin with https:// or http://")
    if parts.username is not None or parts.password is not None:
        raise NotAWebhookUrl("must not hold a user name or password")
    if not url.isascii() or not url.isprintable() or " " in url:
        raise NotAWebhookUrl("has characters that must be percent-encoded")
