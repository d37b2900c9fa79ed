-- What is complete counts, too, until it is swept: its bytes are in the store twice.
CREATE INDEX CONCURRENTLY IF NOT EXISTS uploads_by_owner ON uploads (owner_id);
