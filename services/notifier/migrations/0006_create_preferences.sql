-- The categories of email that a user does not want; whoever has no row wants all.
CREATE TABLE preferences (
    user_id         uuid PRIMARY KEY REFERENCES recipients ON DELETE CASCADE,
    refused_email   text[] NOT NULL,
    updated_at      timestamptz NOT NULL DEFAULT now()
);
