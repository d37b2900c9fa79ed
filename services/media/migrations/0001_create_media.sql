-- What is, or may be, in the object store: `originals/<id>` and `variants/<id>/*`. The row is there before the first
-- byte and goes after the last, so a crash leaves nothing behind that nobody knows of. Identical bytes are one blob.
CREATE TABLE blobs (
    id          uuid PRIMARY KEY,
    sha256      text CHECK (sha256 ~ '^[0-9a-f]{64}$'),
    uses        integer NOT NULL DEFAULT 0 CHECK (uses >= 0),
    -- When a blob without uses is swept: later for an upload in progress, at once for what was let go.
    doomed_at   timestamptz,
    CONSTRAINT blobs_used_or_doomed CHECK ((uses > 0) = (doomed_at IS NULL)),
    -- Without uses it cannot be found by its hash again, so sweeping never meets somebody who has just found it.
    CONSTRAINT blobs_used_have_hash CHECK ((uses > 0) = (sha256 IS NOT NULL)),
    CONSTRAINT blobs_sha256_key UNIQUE (sha256)
);
CREATE INDEX blobs_doomed_at ON blobs (doomed_at) WHERE doomed_at IS NOT NULL;

CREATE TABLE media (
    id              uuid PRIMARY KEY,
    owner_id        uuid NOT NULL,
    blob_id         uuid NOT NULL REFERENCES blobs (id),
    title           text NOT NULL DEFAULT '',
    visibility      text NOT NULL DEFAULT 'private' CHECK (visibility IN ('private', 'public')),
    status          text NOT NULL DEFAULT 'processing' CHECK (status IN ('processing', 'ready', 'failed')),
    failure         text,
    content_type    text NOT NULL,
    bytes           bigint NOT NULL CHECK (bytes > 0),
    width           integer,
    height          integer,
    sha256          text NOT NULL,
    placeholder     text,
    variants        jsonb NOT NULL DEFAULT '[]',
    created_at      timestamptz NOT NULL DEFAULT now(),
    updated_at      timestamptz NOT NULL DEFAULT now(),
    version         bigint NOT NULL DEFAULT 1
);
CREATE INDEX media_owner_id ON media (owner_id, id DESC);
CREATE INDEX media_blob_id ON media (blob_id);

-- Each owner's sums, kept with every change; locking the row makes the quota hold for concurrent uploads.
CREATE TABLE usage (
    owner_id    uuid PRIMARY KEY,
    bytes       bigint NOT NULL CHECK (bytes >= 0),
    items       bigint NOT NULL CHECK (items >= 0)
);
