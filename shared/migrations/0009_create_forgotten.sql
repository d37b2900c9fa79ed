-- Hashes of the ids of users who are gone, so that what comes late does not bring them back.
CREATE TABLE forgotten (
    digest          bytea PRIMARY KEY,
    forgotten_at    timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX forgotten_forgotten_at ON forgotten (forgotten_at);
