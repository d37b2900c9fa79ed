import pytest

from services.users.models import keeps_its_letters, normalised_address
from services.users.passwords import is_common


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("Ann@Example.ORG", "ann@example.org"),
        ("  ann@example.org ", "ann@example.org"),
        ("ANN@EXAMPLE.ORG", "ann@example.org"),
        ("straße@example.org", "strasse@example.org"),
        ("a+b@sub.example.org", "a+b@sub.example.org"),
    ],
)
def test_addresses_are_compared_in_one_form(text: str, address: str) -> None:
    assert normalised_address(text) == address


@pytest.mark.parametrize(
    "text",
    ["", "ann", "@example.org", "ann@", "ann@localhost", "a b@c.de", "a@b@c.de", "a@b..de", "a@b.de\r\nBcc: x@y.z",
             "a" * 65 + "@b.de", "a@" + "b" * 250 + ".de", "a\u202eb@c.de"],
)  # fmt: skip
def test_what_cannot_be_an_address_is_refused(text: str) -> None:
    assert normalised_address(text) is None


@pytest.mark.parametrize("text", ["Ann@Example.ORG ", "JÜRGEN@müller.de", "ju\u0308rgen@example.org", "ann@例え.jp"])
def test_the_case_of_an_address_makes_no_other_of_it(text: str) -> None:
    assert keeps_its_letters(text)


@pytest.mark.parametrize(
    "text", ["groß@example.org", "ann@straße.de", "GROẞ@example.org", "ﬁona@example.org", "\uff41nn@example.org",
             "ann①@example.org", "\u017fam@example.org", "νίκος@example.org"],
)  # fmt: skip
def test_letters_that_stand_for_others_make_another_address(text: str) -> None:
    assert not keeps_its_letters(text)


def test_common_passwords_are_known() -> None:
    assert is_common("password")
    assert is_common("PASSWORD1")
    assert not is_common("correct horse battery")
