CREATE INDEX CONCURRENTLY IF NOT EXISTS campaigns_unfinished ON campaigns (send_at) WHERE finished_at IS NULL;
