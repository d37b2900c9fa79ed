-- The relay reads in the order of the primary key, whichever shards it has.
DROP INDEX CONCURRENTLY IF EXISTS outbox_shard_id;
