-- Email to be sent and sent. What each state means stands in services/notifier/models.py.
CREATE TABLE emails (
    id              uuid PRIMARY KEY,
    event_id        uuid NOT NULL,
    user_id         uuid NOT NULL REFERENCES recipients ON DELETE CASCADE,
    campaign_id     uuid REFERENCES campaigns ON DELETE CASCADE,
    category        text NOT NULL,
    context         jsonb NOT NULL,
    message_id      text NOT NULL,
    state           text NOT NULL DEFAULT 'queued'
                    CHECK (state IN ('queued', 'claimed', 'sending', 'sent', 'failed', 'ambiguous', 'suppressed')),
    attempts        integer NOT NULL DEFAULT 0,
    next_attempt_at timestamptz NOT NULL DEFAULT now(),
    claim           uuid,
    claimed_at      timestamptz,
    sent_at         timestamptz,
    last_error      text,
    created_at      timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT emails_event_category_key UNIQUE (event_id, category)
);
CREATE INDEX emails_due ON emails (next_attempt_at) WHERE state = 'queued' AND campaign_id IS NULL;
-- At most one email of a campaign a recipient, whatever is done twice.
CREATE UNIQUE INDEX emails_campaign_recipient ON emails (campaign_id, user_id) WHERE campaign_id IS NOT NULL;
CREATE INDEX emails_campaign_state ON emails (campaign_id, state, next_attempt_at) WHERE campaign_id IS NOT NULL;
CREATE INDEX emails_in_hand ON emails (claimed_at) WHERE state IN ('claimed', 'sending');
CREATE INDEX emails_user_id ON emails (user_id);
