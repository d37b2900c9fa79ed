-- What notifier knows of a user. Made by whichever event comes first, so the address may be unknown for a while.
CREATE TABLE recipients (
    user_id         uuid PRIMARY KEY,
    email           text,
    display_name    text NOT NULL DEFAULT '',
    locale          text NOT NULL DEFAULT 'en',
    source_version  bigint NOT NULL DEFAULT 0, -- the account's version that this is as new as
    stream_position bigint NOT NULL DEFAULT 0, -- of the newest entry of the user's stream, also when that is deleted
    unsubscribe_token uuid NOT NULL DEFAULT gen_random_uuid() UNIQUE, -- in the links of campaigns
    updated_at      timestamptz NOT NULL DEFAULT now()
);

-- What went over the live streams, for those who come back. Positions are counted up under the lock of the
-- recipient's row, so they become visible in order and none is ever skipped.
CREATE TABLE stream_entries (
    user_id         uuid NOT NULL REFERENCES recipients ON DELETE CASCADE,
    position        bigint NOT NULL,
    event           text NOT NULL,
    data            jsonb NOT NULL,
    created_at      timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (user_id, position)
);
CREATE INDEX stream_entries_created_at ON stream_entries (created_at);
