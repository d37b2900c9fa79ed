CREATE INDEX CONCURRENTLY IF NOT EXISTS webhook_deliveries_old ON webhook_deliveries (created_at)
    WHERE state IN ('delivered', 'failed');
