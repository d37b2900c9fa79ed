-- How others see the original, without its metadata: spans of it and what stands between them (`services.media.shown`).
ALTER TABLE media ADD COLUMN shown jsonb;
