import pytest

from shared.settings import DataSettings, ProcessSettings, Secret, SettingsError, load


class Example(DataSettings, frozen=True, kw_only=True):
    key: Secret


GOOD = {"DATABASE_URL": "postgresql://x", "BUS": "inline", "KEY": "k" * 32}


def test_reads_every_kind_of_value() -> None:
    found = load(
        Example,
        "example",
        {
            **GOOD,
            "PORT": "8123",
            "REUSE_PORT": "true",
            "DRAIN_SECONDS": "0.5",
            "DATABASE_REPLICA_URLS": "postgresql://a, postgresql://b",
            "REDIS_URL": "redis://r",
        },
    )
    assert (found.port, found.reuse_port, found.drain_seconds) == (8123, True, 0.5)
    assert found.database_replica_urls == ("postgresql://a", "postgresql://b")
    assert found.redis_url == "redis://r"


def test_the_service_s_own_variable_wins() -> None:
    assert load(Example, "example", {**GOOD, "PORT": "1", "EXAMPLE_PORT": "2"}).port == 2
    assert load(Example, "other", {**GOOD, "PORT": "1", "EXAMPLE_PORT": "2"}).port == 1


def test_every_fault_is_reported_a_line_a_variable_without_the_values() -> None:
    with pytest.raises(SettingsError) as raised:
        load(Example, "example", {"PORT": "99999", "KEY": "short-secret", "LOG_LEVEL": "loud"})
    lines = raised.value.lines
    assert [line.partition(":")[0] for line in lines] == ["DATABASE_URL", "KEY", "LOG_LEVEL", "PORT"]
    assert "missing" in lines[0]
    assert "short-secret" not in str(raised.value)


def test_an_empty_variable_counts_as_missing() -> None:
    with pytest.raises(SettingsError, match="KEY: missing"):
        load(Example, "example", {**GOOD, "KEY": ""})


def test_kafka_needs_a_broker() -> None:
    with pytest.raises(SettingsError, match="KAFKA_BOOTSTRAP"):
        load(Example, "example", {**GOOD, "BUS": "kafka"})


def test_defaults_suffice_for_a_process_without_data() -> None:
    assert load(ProcessSettings, "gateway", {}).host == "127.0.0.1"
