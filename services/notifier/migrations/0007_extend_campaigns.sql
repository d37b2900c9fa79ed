ALTER TABLE campaigns
    ADD COLUMN window_from  time, -- it is sent at these times of the day only; both ends or none
    ADD COLUMN window_until time,
    ADD COLUMN time_zone    text,
    ADD COLUMN finished_at  timestamptz, -- since when nothing of it is left to send; senders pass it over
    ADD COLUMN counts       jsonb; -- of its emails by state, as they were then

-- Who is forgotten leaves no trace in what he made. The old code writes an author and never reads it.
-- squawk-ignore ban-drop-not-null
ALTER TABLE campaigns ALTER COLUMN created_by DROP NOT NULL;
