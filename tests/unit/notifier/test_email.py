"""Composing messages, reading SMTP_URL, and what each way to fail means."""

import email
import email.policy
from email.message import EmailMessage

import aiosmtplib
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.notifier.channels.email import Composer, Letter, NotSendable
from services.notifier.channels.smtp import SmtpUrl, Stage, judge
from services.notifier.models import Content, EmailState, Outcome, RetryPolicy, in_email, is_sendable, without_links
from services.notifier.settings import Settings
from shared.testing import FixedClock

CONTENT = Content("Grüße\nBcc: eve@example.com", "Hello ü\n.\nbye", "<p>Hello ü</p>")


def parsed(letter: Letter) -> EmailMessage:
    """What the standard library makes of it."""
    return email.message_from_bytes(letter.content, _class=EmailMessage, policy=email.policy.default)


@pytest.fixture
def composer() -> Composer:
    return Composer("Tenfold <no-reply@tenfold.example>", FixedClock())


def test_a_message_has_the_headers_it_needs(composer: Composer) -> None:
    letter = composer.compose(CONTENT, "Ada Löve, Countess", "ada@example.com", "<1@tenfold.example>")
    assert (letter.sender, letter.recipient) == ("no-reply@tenfold.example", "ada@example.com")
    assert letter.content.isascii()
    read = parsed(letter)
    assert read["From"] == "Tenfold <no-reply@tenfold.example>"
    assert read["To"] == '"Ada Löve, Countess" <ada@example.com>'
    assert read["Subject"] == "Grüße Bcc: eve@example.com"
    assert read["Bcc"] is None
    assert read["Message-ID"] == "<1@tenfold.example>"
    assert read["Auto-Submitted"] == "auto-generated"
    assert read["Date"] == "Tue, 01 Jan 2030 00:00:00 +0000"
    assert [part.get_content_type() for part in read.iter_parts()] == ["text/plain", "text/html"]
    text = read.get_body(("plain",))
    assert text is not None
    assert text.get_content().splitlines() == ["Hello ü", ".", "bye"]


@pytest.mark.parametrize(
    "name",
    [
        "Eve\r\nBcc: a@example.com", "Eve\nBcc: a@example.com", "Eve\x00\x1b", "Eve\u2028Bcc: a@example.com",
        'Eve" <eve@example.com>, "', "Eve\\", "Ève\r\nBcc: a@example.com", "Ä" * 100, "=?utf-8?q?Eve=0D=0ABcc:_a?=",
    ],
)  # fmt: skip
def test_a_name_cannot_add_a_header(composer: Composer, name: str) -> None:
    letter = composer.compose(CONTENT, name, "ada@example.com", "<1@tenfold.example>", "https://a.example/u")
    read = parsed(letter)
    assert sorted(read.keys()) == sorted([
        "From", "To", "Subject", "Date", "Message-ID", "Auto-Submitted", "MIME-Version", "Content-Type",
        "List-Unsubscribe", "List-Unsubscribe-Post",
    ])  # fmt: skip
    (to,) = read["To"].addresses
    assert to.addr_spec == "ada@example.com"


@given(text=st.text(), html=st.text(alphabet=st.characters(codec="utf-8")))
def test_any_text_arrives_as_it_was(text: str, html: str) -> None:
    letter = Composer("a@b.example", FixedClock()).compose(Content("s", text, html), "", "ada@example.com", "<1@b>")
    assert all(len(line) <= 78 for line in letter.content.split(b"\n"))
    read = parsed(letter)
    for kind, expected in (("plain", text), ("html", html)):
        part = read.get_body((kind,))
        assert part is not None
        lines = expected.replace("\r\n", "\n").replace("\r", "\n").removesuffix("\n") + "\n"
        assert part.get_content().replace("\r\n", "\n") == lines
    assert not read.defects


@pytest.mark.parametrize(
    "address",
    ["", "ada", "@example.com", "a@b\r\nRCPT TO:<c@d>", "a>@b.c", "a b@c.d", '"a"@b.c', "a@b@c", "a@b,c@d", "a@[::1]"],
)
def test_addresses_that_could_break_a_command_are_refused(composer: Composer, address: str) -> None:
    assert not is_sendable(address)
    with pytest.raises(NotSendable):
        composer.compose(CONTENT, "", address, "<1@tenfold.example>")


def test_international_addresses(composer: Composer) -> None:
    letter = composer.compose(CONTENT, "", "jörg@grün.example", "<1@tenfold.example>")
    assert letter.recipient == "jörg@xn--grn-ioa.example"
    assert "\r\nTo: jörg@xn--grn-ioa.example\r\n".encode() in letter.content
    with pytest.raises(NotSendable):
        composer.compose(CONTENT, "", f"a@{'ü' * 70}.example", "<1@tenfold.example>")


@pytest.mark.parametrize(
    ("name", "greeting"),
    [
        ("Ada", "Ada"),
        (" Ada  Lovelace ", "Ada Lovelace"),
        ("Dr. Ada", "Dr. Ada"),
        ("see evil.example", ""),
        ("https://x", ""),
        ("a@b", ""),
    ],
)
def test_a_name_that_could_become_a_link_is_not_used(name: str, greeting: str) -> None:
    assert without_links(name) == greeting


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("smtp://mail", SmtpUrl("mail", 25, None, None, use_tls=False, start_tls=None)),
        ("smtp://mail:1025?starttls=never", SmtpUrl("mail", 1025, None, None, use_tls=False, start_tls=False)),
        ("smtp://a%40b:p%2Fw@mail?starttls=always", SmtpUrl("mail", 587, "a@b", "p/w", use_tls=False, start_tls=True)),
        ("smtp://u:p@mail", SmtpUrl("mail", 587, "u", "p", use_tls=False, start_tls=True)),
        ("smtps://u:p@mail", SmtpUrl("mail", 465, "u", "p", use_tls=True, start_tls=False)),
    ],
)
def test_smtp_url(url: str, expected: SmtpUrl) -> None:
    assert SmtpUrl.parse(url) == expected


@pytest.mark.parametrize("url", ["", "mail:25", "http://mail", "smtp://", "smtp://u:secret/x@mail", "smtp://m?tls=1"])
def test_a_wrong_smtp_url_is_named_without_its_password(url: str) -> None:
    with pytest.raises(ValueError, match=r"^(must|takes|its port)") as caught:
        SmtpUrl.parse(url)
    assert "secret" not in str(caught.value)


RESPONSE = aiosmtplib.SMTPResponseException
LOST = aiosmtplib.SMTPServerDisconnected("lost")


@pytest.mark.parametrize(
    ("error", "stage", "outcome"),
    [
        (ConnectionRefusedError(), "opening", Outcome.POSTPONED),
        (TimeoutError(), "opening", Outcome.POSTPONED),
        (aiosmtplib.SMTPAuthenticationError(535, "no"), "opening", Outcome.POSTPONED),  # ours to put right
        (aiosmtplib.SMTPSenderRefused(550, "no", "x"), "opening", Outcome.POSTPONED),
        (aiosmtplib.SMTPRecipientRefused(450, "later", "x"), "addressed", Outcome.POSTPONED),
        (aiosmtplib.SMTPRecipientRefused(550, "no such user", "x"), "addressed", Outcome.REFUSED),
        (LOST, "addressed", Outcome.POSTPONED),
        (aiosmtplib.SMTPDataError(451, "later"), "data", Outcome.POSTPONED),
        (aiosmtplib.SMTPDataError(421, "closing"), "data", Outcome.POSTPONED),
        (aiosmtplib.SMTPDataError(554, "spam"), "data", Outcome.REFUSED),
        (LOST, "data", Outcome.AMBIGUOUS),
        (aiosmtplib.SMTPReadTimeoutError("slow"), "data", Outcome.AMBIGUOUS),
        (ConnectionResetError(), "data", Outcome.AMBIGUOUS),
        (RESPONSE(-1, "garbage"), "data", Outcome.AMBIGUOUS),
    ],
)
def test_judge(error: Exception, stage: Stage, outcome: Outcome) -> None:
    assert judge(error, stage).outcome is outcome


def test_reasons_tell_the_reply() -> None:
    assert judge(aiosmtplib.SMTPDataError(451, "try\nlater"), "data").reason == "451 try later"


def _policy(*, retry_ambiguous: bool = False) -> RetryPolicy:
    return RetryPolicy(max_attempts=4, first_delay=5, longest_delay=30, retry_ambiguous=retry_ambiguous)


@pytest.mark.parametrize(
    ("outcome", "attempts", "expected"),
    [
        (Outcome.SENT, 1, (EmailState.SENT, 0)),
        (Outcome.REFUSED, 1, (EmailState.FAILED, 0)),
        (Outcome.POSTPONED, 1, (EmailState.QUEUED, 5)),
        (Outcome.POSTPONED, 2, (EmailState.QUEUED, 15)),
        (Outcome.POSTPONED, 3, (EmailState.QUEUED, 30)),
        (Outcome.POSTPONED, 4, (EmailState.FAILED, 0)),
        (Outcome.AMBIGUOUS, 1, (EmailState.AMBIGUOUS, 0)),
    ],
)
def test_what_follows_an_attempt(outcome: Outcome, attempts: int, expected: tuple[EmailState, float]) -> None:
    assert _policy().decide(outcome, attempts) == expected


def test_ambiguous_is_tried_again_only_where_that_is_wanted() -> None:
    assert _policy(retry_ambiguous=True).decide(Outcome.AMBIGUOUS, 1) == (EmailState.QUEUED, 5)
    assert _policy(retry_ambiguous=True).decide(Outcome.AMBIGUOUS, 4) == (EmailState.AMBIGUOUS, 0)


def test_the_delays_last_for_a_day() -> None:
    settings = Settings(database_url="", jwks_url="", smtp_url="smtp://mail", link_secret="l" * 32)
    policy = RetryPolicy(
        settings.email_max_attempts, settings.email_first_retry_seconds, settings.email_longest_retry_seconds, False
    )
    delays = [policy.decide(Outcome.POSTPONED, n)[1] for n in range(1, settings.email_max_attempts)]
    assert 20 * 3600 < sum(delays) < 28 * 3600


def test_settings_name_what_is_wrong() -> None:
    settings = Settings(
        database_url="",
        bus="inline",
        jwks_url="",
        link_secret="l" * 32,
        smtp_url="mail",
        mail_from="nobody",
        email_lease_seconds=1,
    )
    assert [fault.partition(":")[0] for fault in settings.check()] == ["SMTP_URL", "MAIL_FROM", "EMAIL_LEASE_SECONDS"]


def test_an_email_tells_strangers_no_titles_with_links_and_no_urls() -> None:
    context = {"title": "win at www.example.com", "url": "https://example.com:8443/win?now", "media_id": "1"}
    assert in_email(context) == {"title": "", "url": "example.com", "media_id": "1"}
    assert in_email({"title": "Sunset", "reason": "x"}) == {"title": "Sunset", "reason": "x"}
