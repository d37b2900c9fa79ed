-- Events that failed and wait for their next round, and later events of their key that wait behind them (`ordered`).
CREATE TABLE parked_events (
    id          bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    consumer    text NOT NULL,
    ordered     boolean NOT NULL,
    topic       text NOT NULL,
    event_id    uuid NOT NULL,
    type        text NOT NULL,
    source      text NOT NULL,
    key         text NOT NULL,
    time        timestamptz NOT NULL,
    headers     jsonb NOT NULL,
    data        bytea NOT NULL,
    origin      text NOT NULL,
    rounds      int NOT NULL,
    attempts    int NOT NULL,
    reason      text NOT NULL,
    stack       text NOT NULL,
    due_at      timestamptz NOT NULL,
    UNIQUE (consumer, event_id)
);
CREATE INDEX parked_events_due ON parked_events (consumer, due_at);
CREATE INDEX parked_events_key ON parked_events (consumer, topic, key, id) WHERE ordered;

-- Dead letters of every bus are kept here, with all that a redrive and an operator need.
ALTER TABLE dead_letters
    ADD COLUMN ordered  boolean NOT NULL DEFAULT true,
    ADD COLUMN topic    text NOT NULL DEFAULT '',
    ADD COLUMN source   text NOT NULL DEFAULT '',
    ADD COLUMN key      text NOT NULL DEFAULT '',
    ADD COLUMN time     timestamptz NOT NULL DEFAULT now(),
    ADD COLUMN origin   text NOT NULL DEFAULT '',
    ADD COLUMN attempts int NOT NULL DEFAULT 0,
    ADD COLUMN stack    text NOT NULL DEFAULT '';
