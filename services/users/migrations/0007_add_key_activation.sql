-- A key is published before it signs: the newest that is active does.
ALTER TABLE signing_keys ADD COLUMN active_from timestamptz NOT NULL DEFAULT now();
