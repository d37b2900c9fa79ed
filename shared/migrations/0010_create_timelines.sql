-- The timelines this schema has lived on. A replica tells by the newest one that it has replayed which promotion it
-- followed: PostgreSQL shows that to a superuser only, and its control file learns of it minutes late.
CREATE TABLE timelines (timeline bigint PRIMARY KEY);
