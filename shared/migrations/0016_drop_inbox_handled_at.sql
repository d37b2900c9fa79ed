-- inbox_handled_in takes its place.
DROP INDEX CONCURRENTLY IF EXISTS inbox_handled_at;
