-- What writers must leave in the cache after their commit, until Redis surely has it. See shared/cache.py.
CREATE TABLE cache_notes (
    id          bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    entry       text NOT NULL,
    version     bigint NOT NULL,
    moot_at     timestamptz NOT NULL -- nothing older can be in Redis after that
);
