import msgspec
import pytest

from services.users.schemas import ChangeAccount


def _decode(field: str, value: str) -> ChangeAccount:
    return msgspec.json.decode(msgspec.json.encode({field: value}), type=ChangeAccount)


@pytest.mark.parametrize("name", ["Ada", "  Ada Lovelace ", "日本 🐎", "A"])
def test_a_display_name_is_a_line_of_any_language(name: str) -> None:
    assert _decode("display_name", name).display_name == name


@pytest.mark.parametrize("name", ["", "   ", "x\x00y", "\x00", "\x07", "\x7f", "Ada\n", "Ada\r\nBcc: x@y.z"])
def test_a_display_name_holds_no_control_characters_and_not_only_spaces(name: str) -> None:
    with pytest.raises(msgspec.ValidationError):
        _decode("display_name", name)


@pytest.mark.parametrize("locale", ["en\n", "EN", "", "e", "en-us"])
def test_a_locale_is_a_language_and_perhaps_a_country(locale: str) -> None:
    with pytest.raises(msgspec.ValidationError):
        _decode("locale", locale)


def test_a_bio_may_have_lines_but_no_nul() -> None:
    assert _decode("bio", "one\ntwo\n").bio == "one\ntwo\n"
    with pytest.raises(msgspec.ValidationError):
        _decode("bio", "x\x00")
