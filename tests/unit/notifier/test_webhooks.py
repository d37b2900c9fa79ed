from ipaddress import ip_network

import pytest

from services.notifier.channels.webhook import is_public
from services.notifier.errors import NotAWebhookUrl
from services.notifier.webhooks import check_url


@pytest.mark.parametrize("address", ["93.184.216.34", "2606:4700::1111", "::ffff:93.184.216.34", "64:ff9b::5db8:d822"])
def test_public_addresses_may_be_called(address: str) -> None:
    assert is_public(address)


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "127.255.0.1", "0.0.0.0", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1",
        "224.0.0.1", "255.255.255.255", "::", "::1", "fe80::1", "fe80::1%eth0", "fc00::1", "ff02::1", "fd00:ec2::254",
        "::ffff:127.0.0.1", "::ffff:169.254.169.254", "64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe",
        "2002:7f00:1::", "2002:a00:1::", "64:ff9b:1::7f00:1", "fec0::1", "::7f00:1", "::ffff:0:7f00:1",
    ],
)  # fmt: skip
def test_private_addresses_may_not_in_whatever_form(address: str) -> None:
    assert not is_public(address)


def test_a_network_can_be_allowed() -> None:
    allowed = [ip_network("127.0.0.0/8")]
    assert is_public("127.0.0.1", allowed)
    assert is_public("::ffff:127.0.0.1", allowed)
    assert not is_public("10.0.0.1", allowed)


@pytest.mark.parametrize(
    "url", ["https://example.org/hook", "https://example.org:8443/a?b=c", "https://[2606:4700::1]/"]
)
def test_good_urls(url: str) -> None:
    check_url(url, secure_only=True)


@pytest.mark.parametrize(
    "url",
    [
        "", "example.org", "http://example.org/", "ftp://example.org/", "file:///etc/passwd", "https://", "https:///path",
        "https://user:pw@example.org/", "https://example.org:99999/", "https://exa mple.org/",
        "https://example.org/\r\nX: y",
        "https://[::1/", "https://exämple.org/",
    ],
)  # fmt: skip
def test_other_urls_are_refused(url: str) -> None:
    with pytest.raises(NotAWebhookUrl):
        check_url(url, secure_only=True)
