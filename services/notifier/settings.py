"""What the environment says to notifier. Times are in seconds."""

from email.utils import parseaddr
from ipaddress import ip_network
from typing import Annotated

import msgspec

from services.notifier.channels.smtp import SmtpUrl
from services.notifier.channels.webhook import Network
from shared.settings import Count, DataSettings, Seconds, Secret

Positive = Annotated[float, msgspec.Meta(gt=0)]


class Settings(DataSettings, frozen=True, kw_only=True):
    port: int = 8003
    jwks_url: str
    smtp_url: str  # smtp://[user:password@]host[:port][?starttls=auto|always|never], or smtps://
    mail_from: str = "Tenfold <no-reply@tenfold.example>"
    public_url: str = "http://localhost:8080"
    link_secret: Secret  # opens the tokens of links that users has sealed
    consumer_concurrency: Count = 8
    log_kept_seconds: Seconds = 30 * 24 * 3600.0  # emails of no campaign and deliveries to webhooks that are done with

    stream_heartbeat_seconds: Positive = 15.0
    stream_write_seconds: Positive = 10.0  # who does not read for so long is dropped
    stream_poll_seconds: Positive = 5.0  # the safety net under the wakes through Redis
    stream_poll_alone_seconds: Positive = 1.0  # where there is no Redis
    stream_kept_seconds: Seconds = 24 * 3600.0  # who was away longer finds all in the inbox

    email_concurrency: Count = 20  # connections to the mail server
    email_domain_per_second: Count = 50  # of campaigns, to one domain, by all senders together
    email_poll_seconds: Positive = 1.0
    email_max_attempts: Count = 30  # with the delays below: about a day
    email_first_retry_seconds: Seconds = 5.0
    email_longest_retry_seconds: Seconds = 3600.0
    # False: an email whose answer was lost is not sent again, so it arrives at most once. True: at least once.
    email_retry_ambiguous: bool = False
    email_lease_seconds: Positive = 180.0
    smtp_command_seconds: Positive = 15.0
    smtp_data_seconds: Positive = 60.0
    smtp_messages_per_connection: Count = 100  # what servers commonly allow
    smtp_idle_seconds: Positive = 30.0

    webhook_concurrency: Count = 16
    webhook_poll_seconds: Positive = 1.0
    webhook_timeout_seconds: Positive = 15.0
    # A day, and up to a tenth more: 5 s, 5 min, 30 min, 2 h, 5 h, 7 h, 10 h.
    webhook_retry_seconds: tuple[float, ...] = (5, 300, 1800, 7200, 18000, 25200, 36000)
    # Networks that are not public and may be called all the same, such as 127.0.0.0/8; for development and tests only.
    webhook_private_networks: tuple[str, ...] = ()

    def check(self) -> list[str]:
        faults = super().check()
        try:
            self.private_networks()
        except ValueError as error:
            faults.append(f"WEBHOOK_PRIVATE_NETWORKS: {error}")
        try:
            SmtpUrl.parse(self.smtp_url)
        except ValueError as error:
            faults.append(f"SMTP_URL: {error}")
        if "@" not in parseaddr(self.mail_from)[1]:
            faults.append("MAIL_FROM: is not an address such as `Tenfold <no-reply@example.com>`")
        if self.email_lease_seconds < self.longest_send_seconds:
            # Else another sender would take the email over while the first is still at it.
            faults.append(f"EMAIL_LEASE_SECONDS: must be at least {self.longest_send_seconds:g}, as long as one send")
        return faults

    def private_networks(self) -> tuple[Network, ...]:
        """Raises `ValueError`."""
        return tuple(ip_network(text) for text in self.webhook_private_networks)

    @property
    def longest_send_seconds(self) -> float:
        """Connecting, greeting, TLS, login, MAIL and RCPT take a few commands; then DATA, in two steps, and RSET."""
        return 3 * self.smtp_command_seconds + 2 * self.smtp_data_seconds
