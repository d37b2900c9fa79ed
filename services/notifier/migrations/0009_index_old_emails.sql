CREATE INDEX CONCURRENTLY IF NOT EXISTS emails_old ON emails (created_at)
    WHERE campaign_id IS NULL AND state NOT IN ('queued', 'claimed', 'sending');
