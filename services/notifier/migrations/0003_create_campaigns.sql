-- One text to many users. What is derived from its emails (sent, failed, whether it is done) is counted, not stored.
CREATE TABLE campaigns (
    id              uuid PRIMARY KEY,
    name            text NOT NULL,
    subject         text NOT NULL,
    text            text NOT NULL,
    html            text,
    audience        jsonb NOT NULL,
    send_at         timestamptz NOT NULL,
    state           text NOT NULL DEFAULT 'running' CHECK (state IN ('running', 'paused', 'cancelled')),
    prepared        boolean NOT NULL DEFAULT false, -- whether every recipient has an email in the queue
    created_by      uuid NOT NULL,
    created_at      timestamptz NOT NULL DEFAULT now()
);

-- Addresses that refused email for good.
CREATE TABLE suppressions (
    address         text PRIMARY KEY,
    reason          text NOT NULL,
    created_at      timestamptz NOT NULL DEFAULT now()
);
