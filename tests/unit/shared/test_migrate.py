import pytest

from shared.migrate import Migration, MigrationError, pending

ONE, TWO = Migration("users", "0001_a", "SELECT 1"), Migration("users", "0002_b", "SELECT 2")


def applied(*migrations: Migration) -> dict[tuple[str, str], str]:
    return {(m.origin, m.name): m.checksum for m in migrations}


def test_what_is_not_applied_is_pending_in_order() -> None:
    assert pending([ONE, TWO], {}) == [ONE, TWO]
    assert pending([ONE, TWO], applied(ONE)) == [TWO]
    assert pending([ONE, TWO], applied(ONE, TWO)) == []


def test_a_changed_file_is_refused() -> None:
    with pytest.raises(MigrationError, match="0001_a was changed"):
        pending([ONE], {("users", "0001_a"): "other"})


def test_a_file_that_would_come_too_late_is_refused() -> None:
    with pytest.raises(MigrationError, match="0001_a is older"):
        pending([ONE, TWO], applied(TWO))


def test_the_platform_s_migrations_do_not_hold_up_a_service_s() -> None:
    later = Migration("shared", "0003_c", "SELECT 3")
    assert pending([later, ONE], applied(ONE)) == [later]
