-- An event's headers as they go to the broker. Rows that older code writes have none, and the relay makes them. Older
-- code reads type, source, event_id and headers: a release after this one can drop them.
ALTER TABLE outbox ADD COLUMN record_headers bytea;
