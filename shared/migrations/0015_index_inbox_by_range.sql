-- Rows come in the order of their time, so ranges of pages do for finding the old ones, and cost writers next to nothing.
CREATE INDEX CONCURRENTLY IF NOT EXISTS inbox_handled_in ON inbox USING brin (handled_at) WITH (autosummarize = on);
