-- Uploads that go straight to the store, into `incoming/<id>`, where a client may write until its URL expires, also
-- after it has completed the upload. So the row outlives the URL, and the object goes with the row.
CREATE TABLE uploads (
    id              uuid PRIMARY KEY,
    owner_id        uuid NOT NULL,
    content_type    text NOT NULL,
    bytes           bigint NOT NULL CHECK (bytes > 0),
    expires_at      timestamptz NOT NULL,
    -- When nobody can be writing any more: the sweeper deletes the object, then the row.
    doomed_at       timestamptz NOT NULL CHECK (doomed_at > expires_at),
    media_id        uuid
);
CREATE INDEX uploads_doomed_at ON uploads (doomed_at);
-- What is open counts towards its owner's quota.
CREATE INDEX uploads_owner_id ON uploads (owner_id) WHERE media_id IS NULL;
