"""What a campaign comes to, its texts, and whom it may be for."""

from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
import pytest

from services.notifier.models import Audience, Campaign, CampaignState, EmailState, Progress
from services.notifier.schemas import NewCampaign
from services.notifier.texts import Texts
from shared.ids import new_id

NOW = datetime(2030, 1, 1, tzinfo=UTC)


def campaign(**changes: Any) -> Campaign:
    made = Campaign(new_id(), "n", "s", "t", None, Audience(), None, NOW, "running", True, NOW, None)
    return msgspec.structs.replace(made, **changes)


@pytest.mark.parametrize(
    ("changes", "counts", "state"),
    [
        ({}, {"queued": 1}, CampaignState.RUNNING),
        ({}, {"sending": 1}, CampaignState.RUNNING),
        ({"prepared": False}, {}, CampaignState.RUNNING),
        ({}, {"sent": 3, "failed": 1, "ambiguous": 1, "suppressed": 2}, CampaignState.DONE),
        ({"send_at": NOW + timedelta(hours=1)}, {"queued": 1}, CampaignState.SCHEDULED),
        ({"state": "paused"}, {"queued": 1}, CampaignState.PAUSED),
        ({"state": "cancelled"}, {"queued": 1}, CampaignState.CANCELLED),
        ({"state": "cancelled"}, {}, CampaignState.CANCELLED),
    ],
)
def test_the_state_is_what_was_ordered_and_what_is_left(
    changes: dict[str, object], counts: dict[str, int], state: CampaignState
) -> None:
    progress = Progress.of(campaign(**changes), counts, NOW)
    assert progress.state is state
    assert progress.total == sum(counts.values())


def test_a_finished_one_has_its_counts() -> None:
    progress = Progress.of(campaign(counts={"sent": 4, "failed": 1}), {}, NOW)
    assert (progress.state, progress.total, progress.sent) == (CampaignState.DONE, 5, 4)


@pytest.mark.parametrize(
    ("window", "good"),
    [
        ({"from": "09:00", "until": "18:00", "time_zone": "Europe/Berlin"}, True),
        ({"from": "22:00", "until": "06:00", "time_zone": "UTC"}, True),
        ({"from": "09:00", "until": "09:00", "time_zone": "UTC"}, False),
        ({"from": "09:00+02:00", "until": "18:00", "time_zone": "UTC"}, False),
        ({"from": "09:00", "time_zone": "UTC"}, False),
        ({"from": "25:00", "until": "09:00", "time_zone": "UTC"}, False),
    ],
)
def test_a_window_has_two_ends(window: dict[str, str], good: bool) -> None:
    body = {"name": "n", "subject": "s", "text": "t", "audience": {"all": True}, "window": window}
    encoded = msgspec.json.encode(body)
    if good:
        found = msgspec.json.decode(encoded, type=NewCampaign).model().window
        assert found is not None
        assert found.start.isoformat() == f"{window['from']}:00"
    else:
        with pytest.raises(msgspec.ValidationError):
            msgspec.json.decode(encoded, type=NewCampaign)


def test_those_in_hand_count_as_queued() -> None:
    counts = {EmailState.QUEUED: 2, EmailState.CLAIMED: 1, EmailState.SENDING: 1, EmailState.SENT: 5}
    progress = Progress.of(campaign(), {state.value: number for state, number in counts.items()}, NOW)
    assert (progress.queued, progress.sent, progress.total) == (4, 5, 9)


@pytest.mark.parametrize(
    "audience", [{}, {"all": False}, {"all": True, "locale": "de"}, {"user_ids": []}, {"locale": "german"}, {"who": 1}]
)
def test_an_audience_is_exactly_one_of_three(audience: dict[str, object]) -> None:
    body = {"name": "n", "subject": "s", "text": "t", "audience": audience}
    with pytest.raises(msgspec.ValidationError):
        msgspec.json.decode(msgspec.json.encode(body), type=NewCampaign)


def test_the_texts_end_with_the_way_out() -> None:
    texts = Texts("https://photos.example/")
    url = texts.unsubscribe_url(token := new_id())
    assert url == f"https://photos.example/api/v1/unsubscribe/{token}"
    content = texts.campaign("News\r\nBcc: x@y.z", "Hello <you>", None, "de", url)
    assert "\n" not in content.subject
    assert url in content.text
    assert f'href="{url}"' in content.html
    assert "Hello &lt;you&gt;" in content.html
    assert "<h1>Hi</h1>" in texts.campaign("s", "t", "<h1>Hi</h1>", "en", url).html
