"""What people read: Jinja templates by language and category, `templates/<language>/<category>.<part>`.

Parts: `subject` (also the title in the inbox), `summary` (the body there), `text` and `html` (the email).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any
from uuid import UUID

import jinja2

from services.notifier.models import Category, Content, one_line

FALLBACK = "en"
_FOLDER = Path(__file__).parent / "templates"


class Texts:
    def __init__(self, public_url: str) -> None:
        self._public_url = public_url.rstrip("/")
        self._environment = jinja2.Environment(
            loader=jinja2.FileSystemLoader(_FOLDER),
            autoescape=jinja2.select_autoescape(["html"]),
            undefined=jinja2.StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
            auto_reload=False,
        )
        self._environment.globals["public_url"] = self._public_url
        self._languages = frozenset(path.name for path in _FOLDER.iterdir() if path.is_dir())

    def notice(self, category: str, locale: str, context: Mapping[str, Any]) -> tuple[str, str]:
        """Title and body of a notification."""
        return one_line(self._part("subject", category, locale, context)), one_line(
            self._part("summary", category, locale, context)
        )

    def email(self, category: str, locale: str, context: Mapping[str, Any]) -> Content:
        return Content(
            subject=one_line(self._part("subject", category, locale, context)),
            text=self._part("text", category, locale, context),
            html=self._part("html", category, locale, context),
        )

    def unsubscribe_url(self, token: UUID) -> str:
        return f"{self._public_url}/api/v1/unsubscribe/{token}"

    def campaign(self, subject: str, text: str, html: str | None, locale: str, unsubscribe_url: str) -> Content:
        """A campaign's own texts, with a footer that tells how to get no more. `html` is its author's, as it is."""
        context = {"body": text, "html_body": html, "unsubscribe_url": unsubscribe_url, "subject": one_line(subject)}
        return Content(
            subject=one_line(subject),
            text=self._part("text", Category.CAMPAIGN, locale, context),
            html=self._part("html", Category.CAMPAIGN, locale, context),
        )

    def page(self, name: str, locale: str, context: Mapping[str, Any]) -> str:
        """A page for people, by the name of its template."""
        return self._part("html", name, locale, context)

    def _part(self, part: str, category: str, locale: str, context: Mapping[str, Any]) -> str:
        language = locale.partition("-")[0]
        folder = language if language in self._languages else FALLBACK
        return self._environment.get_template(f"{folder}/{category}.{part}").render(context, language=folder)
