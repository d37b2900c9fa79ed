-- Events written in the transaction of the change they tell of, deleted when the broker has them.
CREATE TABLE outbox (
    id          bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    shard       smallint NOT NULL,
    topic       text NOT NULL,
    event_id    uuid NOT NULL,
    type        text NOT NULL,
    source      text NOT NULL,
    key         text NOT NULL,
    time        timestamptz NOT NULL DEFAULT clock_timestamp(),
    headers     jsonb NOT NULL DEFAULT '{}',
    data        bytea NOT NULL
);
CREATE INDEX outbox_shard_id ON outbox (shard, id);

-- Ids of events already handled, written in the transaction of their effect. Two consumers of one event do not collide.
CREATE TABLE inbox (
    consumer    text NOT NULL,
    event_id    uuid NOT NULL,
    handled_at  timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (consumer, event_id)
);
CREATE INDEX inbox_handled_at ON inbox (handled_at);

-- Events that could not be handled, where no broker keeps them (BUS=inline).
CREATE TABLE dead_letters (
    consumer    text NOT NULL,
    event_id    uuid NOT NULL,
    type        text NOT NULL,
    reason      text NOT NULL,
    headers     jsonb NOT NULL,
    data        bytea NOT NULL,
    died_at     timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (consumer, event_id)
);
