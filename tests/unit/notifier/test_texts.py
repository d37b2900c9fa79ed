"""What people read: every template renders in every language, and nothing that people wrote becomes markup."""

from pathlib import Path

import pytest

import services.notifier
from services.notifier.models import Category
from services.notifier.texts import Texts

TEMPLATES = Path(services.notifier.__file__).parent / "templates"
CONTEXT = {
    "display_name": "Ada",
    "title": "Sunset",
    "reason": "the file is damaged",
    "media_id": "1",
    "url": "https://a.example/",
    "token": "t0ken",
    "valid_hours": 1,
}


@pytest.fixture
def texts() -> Texts:
    return Texts("https://photos.example/")


@pytest.mark.parametrize("language", sorted(path.name for path in TEMPLATES.iterdir() if path.is_dir()))
@pytest.mark.parametrize("category", [c for c in Category if c is not Category.CAMPAIGN])
@pytest.mark.parametrize("missing", [{}, {"display_name": "", "title": ""}])
def test_every_text_is_there(texts: Texts, language: str, category: Category, missing: dict[str, str]) -> None:
    title, body = texts.notice(category, language, CONTEXT | missing)
    content = texts.email(category, language, CONTEXT | missing)
    assert title == content.subject
    assert title.strip() == title != ""
    assert body.strip() == body != ""
    assert "https://photos.example/\n" in content.text
    assert 'href="https://photos.example/"' in content.html
    assert f'<html lang="{language}">' in content.html
    assert "{" not in content.text + title + body


@pytest.mark.parametrize("language", ["de", "en"])
@pytest.mark.parametrize(
    ("category", "fragment"),
    [
        (Category.WELCOME, "#verify=t0ken"),
        (Category.VERIFY_EMAIL, "#verify=t0ken"),
        (Category.RESET_PASSWORD, "#reset=t0ken"),
    ],
)
def test_links_are_in_the_email_and_nowhere_else(
    texts: Texts, language: str, category: Category, fragment: str
) -> None:
    content = texts.email(category, language, CONTEXT)
    assert f"https://photos.example/{fragment}\n" in content.text
    assert f'href="https://photos.example/{fragment}"' in content.html
    assert "t0ken" not in "".join(texts.notice(category, language, CONTEXT))


def test_a_welcome_without_a_link_leads_to_the_page(texts: Texts) -> None:
    assert "verify" not in texts.email(Category.WELCOME, "en", CONTEXT | {"token": ""}).html


def test_html_escapes_what_people_wrote_and_text_does_not(texts: Texts) -> None:
    content = texts.email(Category.MEDIA_FAILED, "en", CONTEXT | {"title": "<script>", "reason": 'a "b" & <c>'})
    assert "<script>" not in content.html
    assert "&lt;script&gt;" in content.html
    assert "a &#34;b&#34; &amp; &lt;c&gt;" in content.html
    assert "“<script>” could not" in content.text


def test_a_title_with_line_breaks_stays_one_line(texts: Texts) -> None:
    content = texts.email(Category.MEDIA_READY, "en", CONTEXT | {"title": "a\r\nBcc: eve@example.com"})
    assert content.subject == "“a Bcc: eve@example.com” is ready"


@pytest.mark.parametrize(
    ("locale", "start"), [("de", "Willkommen"), ("de-AT", "Willkommen"), ("fr", "Welcome"), ("", "Welcome")]
)
def test_the_language_is_the_recipients_or_english(texts: Texts, locale: str, start: str) -> None:
    assert texts.notice(Category.WELCOME, locale, CONTEXT)[0].startswith(start)


def test_languages_have_the_same_templates() -> None:
    found = {
        folder.name: sorted(path.name for path in folder.iterdir()) for folder in TEMPLATES.iterdir() if folder.is_dir()
    }
    assert set(found) == {"de", "en"}
    assert found["de"] == found["en"]
